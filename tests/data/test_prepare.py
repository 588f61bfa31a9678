import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.prepare import Prepared, load_prepared, prepare
from farspan.data.text import read_document, text_files
from farspan.data.tokenizer import Tokenizer


def _prepare(texts: Path, directory: Path, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {
        "tokenizer": None,
        "vocabulary_size": 800,
        "heldout_fraction": 0.2,
        "seed": 3,
        "report": lambda line: None,
    }
    return prepare([str(texts)], directory, **(settings | changes))


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _read_all(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(number, 0, int(length)).tolist() for number, length in enumerate(corpus.lengths)]


def _names(texts: Path, prepared: Prepared, split: Any) -> set[str]:
    """Which files a split holds, found by their content."""
    tokenizer = Tokenizer(prepared.tokenizer_path)
    names = {read_document(document.path): document.name for document in text_files(texts, (".py", ".txt"))}
    return {names[tokenizer.decode(tokens)] for tokens in _read_all(Corpus(prepared, split))}


def test_every_document_comes_back_from_one_of_the_splits(texts: Path, prepared: Prepared) -> None:
    tokenizer = Tokenizer(prepared.tokenizer_path)
    read = []
    for split in ("train", "heldout"):
        documents = _read_all(Corpus(prepared, split))
        assert all(document[-1] == prepared.eod and prepared.eod not in document[:-1] for document in documents)
        assert len(documents) == prepared.documents[split] > 0
        assert sum(map(len, documents)) == prepared.tokens[split]
        read += [tokenizer.decode(document) for document in documents]
    documents = [read_document(document.path) for document in text_files(texts, (".py", ".txt"))]
    assert sorted(read) == sorted(text for text in documents if text)  # empty ones are dropped
    assert prepared.vocabulary_size == tokenizer.vocabulary_size == 800
    assert prepared.tokenizer_digest == tokenizer.digest


def test_a_corpus_reads_any_part_of_a_document(prepared: Prepared) -> None:
    corpus = Corpus(prepared, "train")
    document = int(corpus.lengths.argmax())
    length = int(corpus.lengths[document])
    whole = corpus.read(document, 0, length)
    assert whole.dtype == corpus.lengths.dtype == np.int64
    assert corpus.read(document, 5, 9).tolist() == whole[5:9].tolist()
    assert corpus.read(document, length - 1, length).tolist() == [prepared.eod]
    assert corpus.read(document, 7, 7).tolist() == []
    for start, stop in [(-1, 2), (0, length + 1), (3, 2)]:
        with pytest.raises(IndexError):
            corpus.read(document, start, stop)


def test_tokens_are_stored_in_two_bytes_where_the_vocabulary_fits(prepared: Prepared) -> None:
    assert (prepared.directory / "train.bin").stat().st_size == 2 * prepared.tokens["train"]


def test_the_split_of_a_document_does_not_depend_on_the_others(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    heldout = _names(texts, prepared, "heldout")
    fewer = tmp_path / "fewer"
    shutil.copytree(texts, fewer)
    removed = {f"{number:02d}.py" for number in range(0, 60, 3)}
    for name in removed:
        (fewer / name).unlink()
    again = _prepare(fewer, tmp_path / "again", tokenizer=prepared.tokenizer_path)
    assert _names(fewer, again, "heldout") == heldout - removed
    other_seed = _prepare(texts, tmp_path / "other", tokenizer=prepared.tokenizer_path, seed=4)
    assert _names(texts, other_seed, "heldout") != heldout


def test_preparing_again_does_nothing_wherever_the_text_lies(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "moved")
    times = {path: path.stat().st_mtime_ns for path in prepared.directory.iterdir()}
    lines: list[str] = []
    assert _prepare(tmp_path / "moved", prepared.directory, report=lines.append) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.directory.iterdir()} == times
    assert len(lines) == 1
    assert "already" in lines[0]
    assert load_prepared(prepared.directory) == prepared


def test_two_preparations_of_the_same_are_the_same_files_with_any_number_of_processes(
    texts: Path, prepared: Prepared, tmp_path: Path
) -> None:
    _prepare(texts, tmp_path / "below" / "tokens", processes=2)
    assert _contents(tmp_path / "below" / "tokens") == _contents(prepared.directory)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"seed": 4}, "run.seed"),
        ({"heldout_fraction": 0.3}, "data.heldout_fraction"),
        ({"vocabulary_size": 700}, "data.vocabulary_size or data.tokenizer"),
    ],
)
def test_a_directory_with_other_settings_is_never_overwritten(
    texts: Path, prepared: Prepared, changes: dict[str, Any], other: str
) -> None:
    before = _contents(prepared.directory)
    with pytest.raises(DataError, match=rf"{prepared.directory} .*\(other {other}\): remove it"):
        _prepare(texts, prepared.directory, **changes)
    assert _contents(prepared.directory) == before


@pytest.mark.parametrize("change", ["content", "name", "added"])
def test_a_directory_with_other_documents_is_never_overwritten(
    texts: Path, prepared: Prepared, tmp_path: Path, change: str
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(texts, changed)
    if change == "content":  # of the same size
        content = (changed / "00.py").read_bytes()
        (changed / "00.py").write_bytes(content[:-1] + b"#")
    elif change == "name":
        (changed / "00.py").rename(changed / "zz.py")
    else:
        (changed / "new.txt").write_text("new")
    with pytest.raises(DataError, match=r"other documents"):
        _prepare(changed, prepared.directory)


def test_a_directory_with_something_else_is_refused_and_an_empty_one_used(
    texts: Path, prepared: Prepared, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"mine exists and is not a prepared dataset.*data\.directory"):
        _prepare(texts, tmp_path / "mine", tokenizer=prepared.tokenizer_path)
    (tmp_path / "empty").mkdir()
    _prepare(texts, tmp_path / "empty", tokenizer=prepared.tokenizer_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]
    assert load_prepared(tmp_path / "empty").tokens == prepared.tokens


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_preparation_leaves_nothing_that_loads_and_is_gone_on_with(
    texts: Path, prepared: Prepared, tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupt(line: str) -> None:
        if "training a tokenizer" in line:
            raise error

    with pytest.raises(error):
        _prepare(texts, tmp_path / "tokens", report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.partial"]
    for directory in (tmp_path / "tokens", tmp_path / "tokens.partial"):
        with pytest.raises(DataError, match="farspan prepare CONFIG"):
            load_prepared(directory)
    lines: list[str] = []
    _prepare(texts, tmp_path / "tokens", report=lines.append)
    assert any(line.startswith("going on with") for line in lines)
    assert _contents(tmp_path / "tokens") == _contents(prepared.directory)


def _meanwhile(act: Callable[[], object]) -> Callable[[str], None]:
    """Acts once, in the middle of a preparation."""
    waiting = [act]

    def report(line: str) -> None:
        if waiting and "training a tokenizer" in line:
            waiting.pop()()

    return report


@pytest.mark.parametrize("seed", [3, 4])
def test_of_two_preparations_at_once_the_later_is_refused(
    texts: Path, prepared: Prepared, tmp_path: Path, seed: int
) -> None:
    directory = tmp_path / "tokens"

    def be_refused() -> None:
        with pytest.raises(
            DataError, match=rf"tokens .* is being prepared by process {os.getpid()} on .*data\.directory"
        ):
            _prepare(texts, directory, seed=seed)

    _prepare(texts, directory, report=_meanwhile(be_refused))
    assert _contents(directory) == _contents(prepared.directory)
    assert list(tmp_path.iterdir()) == [directory]


def test_a_document_that_changes_meanwhile_is_refused(texts: Path, tmp_path: Path) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(texts, changing)
    with pytest.raises(DataError, match=r"07\.py of data\.sources changed while it was prepared"):
        _prepare(changing, tmp_path / "tokens", report=_meanwhile(lambda: (changing / "07.py").write_text("new")))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 1 - 1e-9])
def test_an_empty_split_is_refused(texts: Path, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=r"data\.heldout_fraction"):
        _prepare(texts, tmp_path / "tokens", heldout_fraction=fraction)


def test_of_few_documents_one_is_held_out(prepared: Prepared, tmp_path: Path) -> None:
    """Where the draw keeps none it is the one that is nearest to the share asked for; of one document none can be."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, words in (("a", 4000), ("b", 300), ("c", 40)):
        (folder / f"{name}.txt").write_text("word " * words)
    held = {}
    for fraction in (1e-9, 0.05):
        few = _prepare(folder, tmp_path / str(fraction), tokenizer=prepared.tokenizer_path, heldout_fraction=fraction)
        assert dict(few.documents) == {"train": 2, "heldout": 1}
        held[fraction] = _names(folder, few, "heldout")
    assert held == {1e-9: {"c.txt"}, 0.05: {"b.txt"}}
    for name in "bc":
        (folder / f"{name}.txt").unlink()
    with pytest.raises(DataError, match=r"data\.sources has one document, a\.txt, and .*divide it into several files"):
        _prepare(folder, tmp_path / "one", tokenizer=prepared.tokenizer_path)


def test_text_that_is_not_utf8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt"):
        _prepare(tmp_path / "texts", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


@pytest.fixture
def copy(prepared: Prepared, tmp_path: Path) -> Path:
    shutil.copytree(prepared.directory, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_missing_or_unfinished_directory_says_what_to_run(copy: Path, tmp_path: Path) -> None:
    (copy / "dataset.json").unlink()
    for directory in (tmp_path / "missing", copy):
        with pytest.raises(DataError, match=rf"{directory} .*farspan prepare CONFIG"):
            load_prepared(directory)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "heldout.bin", "heldout.idx", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_cut_file_is_noticed(copy: Path, name: str, damage: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "cut":
        (copy / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"damaged \({name}"):
        load_prepared(copy)


def test_opening_notices_another_tokenizer_of_the_same_size(copy: Path) -> None:
    content = bytearray((copy / "tokenizer.model").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged \(tokenizer\.model"):
        load_prepared(copy)


@pytest.mark.parametrize("name", ["train.bin", "heldout.idx", "tokenizer.model"])
def test_preparing_again_notices_one_changed_byte(texts: Path, copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged \({name}"):
        _prepare(texts, copy)


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 99}'])
def test_a_description_that_cannot_be_read_is_refused(copy: Path, content: str) -> None:
    (copy / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        load_prepared(copy)


def test_only_the_tokenizer_of_the_data_is_accepted(texts: Path, prepared: Prepared, copy: Path) -> None:
    prepared.check_tokenizer(copy / "tokenizer.model")
    with pytest.raises(DataError, match=r"data\.tokenizer is .*another tokenizer"):
        prepared.check_tokenizer(prepared.directory / "train.bin")
    with pytest.raises(DataError, match=r"data\.tokenizer is .*where no file is"):
        prepared.check_tokenizer(copy / "nothing.model")


def test_a_given_tokenizer_is_used_and_kept_with_the_data(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    given = _prepare(texts, tmp_path / "tokens", tokenizer=prepared.tokenizer_path, vocabulary_size=5)
    assert given.tokenizer_digest == prepared.tokenizer_digest
    assert given.tokenizer_path.parent == given.directory
    assert given.tokens == prepared.tokens
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        _prepare(texts, tmp_path / "never", tokenizer=tmp_path / "missing.model")


def test_the_description_counts_what_the_files_hold(prepared: Prepared) -> None:
    description = json.loads((prepared.directory / "dataset.json").read_text())
    assert description["splits"]["heldout"] == {
        "documents": prepared.documents["heldout"],
        "tokens": prepared.tokens["heldout"],
    }
    assert description["fingerprint"] == prepared.fingerprint
