"""What a source may be: the same texts give the same tokens, however they are stored."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from farspan.data import pieces, tables
from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.indexed import write_index
from farspan.data.pieces import Position, read_source
from farspan.data.prepare import Prepared, prepare
from farspan.data.segments import last_cut
from farspan.data.sources import Source, files_left_out, list_sources
from farspan.data.texts import read_texts

TEXTS = [f"document {number}: " + "some words and more of them, é 漢 😀\n" * (number % 7) for number in range(400)]


def _lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(
        json.dumps({"n": n, key: text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(texts)
    ).encode()


def _zstd(path: Path, content: bytes) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def _table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"n": range(len(texts)), "text": texts})


def _dataset(folder: Path, texts: list[str]) -> None:
    """As `datasets` 5.2 saves one to the disk, in two files."""
    folder.mkdir()
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (texts[:150], texts[150:])):
        table = _table(part)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def _store(kind: str, folder: Path, texts: list[str]) -> Path:
    path = folder / kind
    writers: dict[str, Callable[[], object]] = {
        "lines.jsonl": lambda: path.write_bytes(_lines(texts)),
        "lines.jsonl.gz": lambda: path.write_bytes(gzip.compress(_lines(texts[:9])) + gzip.compress(_lines(texts[9:]))),
        "lines.jsonl.zst": lambda: _zstd(path, _lines(texts)),
        "table.parquet": lambda: pyarrow.parquet.write_table(_table(texts), path, row_group_size=130),
        "dataset": lambda: _dataset(path, texts),
    }
    writers[kind]()
    return path


KINDS = ["lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst", "table.parquet", "dataset"]


def _read(source: str | Source) -> list[str]:
    return [str(text.content) for text in read_texts(list_sources([source]), 1 << 20, False)]


def _prepare(sources: list[str | Source], directory: Path, prepared: Prepared, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"vocabulary_size": 1, "heldout_fraction": 0.1, "seed": 0, "report": lambda line: None}
    return prepare(sources, directory, tokenizer=prepared.tokenizer_path, **(settings | changes))


def _decoded(prepared: Prepared, split: Any) -> list[str]:
    corpus, tokenizer = Corpus(prepared, split), prepared.open_tokenizer()
    return [tokenizer.decode(corpus.read(number, 0, int(length))) for number, length in enumerate(corpus.lengths)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_all_texts_in_order(tmp_path: Path, kind: str) -> None:
    assert _read(str(_store(kind, tmp_path, TEXTS))) == TEXTS


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_after_any_document(tmp_path: Path, kind: str) -> None:
    listing = list_sources([str(_store(kind, tmp_path, TEXTS))])[0]
    whole = list(read_source(listing, Position(), 1 << 20))
    assert len(whole) == len(TEXTS)
    assert whole[-1].read <= listing.size
    for number in (0, 1, 99, 129, 130, 149, 150, 398, 399):
        rest = list(read_source(listing, whole[number].after, 1 << 20))
        assert [piece[:6] for piece in rest] == [piece[:6] for piece in whole[number + 1 :]]


def test_tokens_are_taken_as_they_are(tmp_path: Path, prepared: Prepared) -> None:
    (tmp_path / "lines.jsonl").write_bytes(_lines(TEXTS))
    one = _prepare([str(tmp_path / "lines.jsonl")], tmp_path / "one", prepared)
    for path in ("one/train.bin", "one/train.idx", "one/train"):
        two = _prepare([str(tmp_path / path)], tmp_path / path.replace("/", "-"), prepared)
        assert sorted(_decoded(two, "train") + _decoded(two, "heldout")) == sorted(_decoded(one, "train"))
        assert two.tokens["train"] + two.tokens["heldout"] == one.tokens["train"]  # no second end of document


def test_sources_are_told_apart_by_their_ranges(tmp_path: Path, prepared: Prepared) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(f"note {number}")
    lines = _store("lines.jsonl", tmp_path, TEXTS)
    sources: list[str | Source] = [str(lines), Source(str(folder), name="diary")]
    made = _prepare(sources, tmp_path / "out", prepared)
    assert list(made.sources) == ["lines.jsonl", "diary"]
    for split in ("train", "heldout"):
        ranges = [made.sources[name][split] for name in made.sources]
        assert ranges[0].start == 0
        assert ranges[0].stop == ranges[1].start
        assert ranges[1].stop == made.documents[split] > 0
        texts = _decoded(made, split)
        assert all(texts[number].startswith("document ") for number in ranges[0])
        assert all(texts[number].startswith("note ") for number in ranges[1])


def test_a_folder_can_be_one_long_document(tmp_path: Path, prepared: Prepared) -> None:
    repository = tmp_path / "repository"
    (repository / "src").mkdir(parents=True)
    (repository / "main.c").write_text("int main;")  # its last line has no end
    (repository / "src" / "a.c").write_text("int a;\n")
    (repository / "src" / "empty.c").write_text("")
    (repository / "src" / "long.c").write_text("long b; " * 200_000)
    (repository / "picture.png").write_bytes(b"\xff\x00")
    source = Source(str(repository), name="code", as_one_document=True, suffixes=(".c", ".h"))
    lines = _store("lines.jsonl", tmp_path, TEXTS)
    made = _prepare([source, str(lines)], tmp_path / "out", prepared, seed=2, heldout_fraction=0.01)
    assert len(made.sources["code"]["train"]) == 1
    assert _decoded(made, "train")[0] == "int main;\nint a;\n" + "long b; " * 200_000


def test_long_texts_have_the_tokens_that_they_have_whole(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(TEXTS) + "x" * 5000 + " the end"
    (tmp_path / "long.txt").write_text(text)
    listing = list_sources([str(tmp_path / "long.txt")])[0]
    monkeypatch.setattr(pieces, "_PIECE", 1000)
    parts = list(read_source(listing, Position(), 1 << 20))
    assert len(parts) > 50
    assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    contents = [bytes(part.content).decode() for part in parts if isinstance(part.content, bytes)]
    assert "".join(contents) == text
    tokenizer = prepared.open_tokenizer()
    assert [int(id) for content in contents for id in tokenizer.encode(content)] == tokenizer.encode(text).tolist()


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(TEXTS, key="content"))
    assert _read(Source(str(tmp_path / "a.jsonl"), text_key="content")) == TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS}), tmp_path / "a.parquet")
    assert _read(Source(str(tmp_path / "a.parquet"), text_key="content")) == TEXTS


def test_a_folder_may_hold_all_kinds(tmp_path: Path) -> None:
    for kind in KINDS[:4]:
        _store(kind, tmp_path, TEXTS[:3])
    (tmp_path / "a.txt").write_text("alone")
    assert _read(str(tmp_path)) == ["alone", *TEXTS[:3] * 4]


def test_names_are_unique(tmp_path: Path) -> None:
    for name in ("a/text", "b/text"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.txt").write_text(name)
    a, b = str(tmp_path / "a/text"), str(tmp_path / "b/text")
    assert [listing.name for listing in list_sources([a, b])] == [a, b]
    assert [listing.name for listing in list_sources([a, Source(b, name="other")])] == ["text", "other"]
    with pytest.raises(DataError, match="2 sources that are called 'same'"):
        list_sources([Source(a, name="same"), Source(b, name="same")])


def test_several_datasets_in_a_folder_are_for_the_user_to_choose_from(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several datasets \(train, test\): name one, such as .*train"):
        list_sources([str(tmp_path)])


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        ("table.parquet", "body", r"no column 'body', but n, text: .*text_key"),
        ("table.parquet", "n", r"int64 in its column 'n', and not text"),
        ("dataset", "body", r"no column 'body'"),
        ("lines.jsonl", "body", r"lines\.jsonl:1 .* is without text under 'body' \(text_key\)"),
    ],
)
def test_a_field_without_text_is_refused_with_what_there_is(tmp_path: Path, kind: str, key: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        _read(Source(str(_store(kind, tmp_path, TEXTS)), text_key=key))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_what_needs_pyarrow_says_how_to_install_it(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _store(kind, tmp_path, TEXTS)
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package pyarrow: pip install 'farspan\[data\]'"):
        _read(str(path))


def test_only_folders_of_text_are_one_document(tmp_path: Path) -> None:
    write_index(tmp_path / "tokens.idx", np.array([2]), np.dtype("<u2"))
    (tmp_path / "tokens.bin").write_bytes(b"A\0B\0")
    for path in (*(_store(kind, tmp_path, TEXTS) for kind in ("lines.jsonl", "dataset")), tmp_path / "tokens"):
        with pytest.raises(DataError, match=r"is no text file, .* as_one_document"):
            list_sources([Source(str(path), as_one_document=True)])


def test_a_file_is_not_read_in_two_ways(tmp_path: Path) -> None:
    answers = Source(str(_store("lines.jsonl", tmp_path, TEXTS)), name="answers", text_key="n")
    _store("table.parquet", tmp_path, TEXTS)
    assert [len(listing.files) for listing in list_sources([answers, str(tmp_path)])] == [1, 1]
    with pytest.raises(DataError, match=r"all of answers is in .* as well, which reads it with another text_key"):
        list_sources([str(tmp_path), answers])


@pytest.mark.parametrize("whole", [b"ab c", b"ab  c d", b"abc d ", b"abc  ", b"abcdef", b" a", b"a b", b"\n a\n b"])
def test_a_cut_is_found_wherever_reading_paused(whole: bytes) -> None:
    for paused in range(len(whole)):
        if last_cut(whole[:paused]) == 0:
            assert last_cut(whole, paused) == last_cut(whole)


def test_what_is_left_out_of_a_folder_is_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.rst", "c.rst", "below/d.html", "LICENSE", "e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    (listing,) = list_sources([str(tmp_path)])
    assert files_left_out(listing).startswith("2 .rst, 1 ")
    assert files_left_out(listing).endswith(" files, which data.sources.suffixes do not name")
    assert "1 .html" in files_left_out(listing)
    assert files_left_out(list_sources([str(tmp_path / "a.txt")])[0]) == ""


def test_compressed_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"a\.txt\.gz is compressed, which only \.jsonl may be: unpack it first"):
        list_sources([str(tmp_path / "a.txt.gz")])


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    for kind in KINDS[:4]:
        _store(kind, tmp_path, TEXTS[:3]).rename(tmp_path / kind.upper())
    assert _read(str(tmp_path)) == TEXTS[:3] * 4


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_rows_that_are_no_utf_8_are_refused_or_dropped(tmp_path: Path, kind: pyarrow.DataType) -> None:
    binary = pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()
    column = pyarrow.array([b"good", b"\xff bad", None, "\u00e9".encode()], binary).view(kind)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"a\.parquet:1 of .* is not UTF-8 text"):
        _read(str(path))
    assert [text.content for text in read_texts(list_sources([str(path)]), 1 << 20, True)] == ["good", "\u00e9"]
    assert [text.content for text in read_texts(list_sources([str(path)]), 1, True)] == []  # two bytes


def test_tokens_ask_for_their_tokenizer(tmp_path: Path, prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"train holds tokens already: set data\.tokenizer"):
        prepare(
            [str(prepared.directory / "train")],
            tmp_path / "out",
            tokenizer=None,
            vocabulary_size=300,
            heldout_fraction=0.1,
            seed=0,
        )
