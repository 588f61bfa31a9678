"""What is wrong with a source is said in one line, and nothing half-written can be loaded."""

import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.indexed import write_index
from farspan.data.prepare import Prepared, prepare
from farspan.data.report import read_report

GOOD = [json.dumps({"text": f"text number {number}"}).encode() for number in range(40)]


def _prepare(source: Path, directory: Path, prepared: Prepared, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"vocabulary_size": 1, "heldout_fraction": 0.1, "seed": 0, "report": lambda line: None}
    return prepare([str(source)], directory, tokenizer=prepared.tokenizer_path, **(settings | changes))


def _refused(source: Path, tmp_path: Path, prepared: Prepared, words: str, **changes: Any) -> None:
    with pytest.raises(DataError, match=words) as raised:
        _prepare(source, tmp_path / "out", prepared, **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


BAD_LINES = {
    "not UTF-8 text": b'{"text": "caf\xe9"}',
    "not JSON": b'{"text": "cut',
    "without text under 'text' (text_key)": b'{"body": "x"}',
    "longer than 2,000 bytes (data.max_record_bytes)": b'{"text": "' + b"x" * 3000 + b'"}',
}
OTHER_BAD_LINES = [b'{"text": "half \\ud800 a character"}', b"[1]", b'{"text": 5}', b'{"text": null}', b"[" * 1900]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("reason", list(BAD_LINES))
def test_a_bad_line_is_named_or_dropped_and_counted(
    tmp_path: Path, prepared: Prepared, reason: str, processes: int
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*GOOD[:30], BAD_LINES[reason], *GOOD[30:], b'{"text": ""}', b"", b""]))
    place = rf"a\.jsonl:31 of .*a\.jsonl in data\.sources is {reason.split('(')[0]}.*data\.drop_invalid"
    settings = {"max_record_bytes": 2000, "processes": processes}
    _refused(source, tmp_path, prepared, place, **settings)
    made = _prepare(source, tmp_path / "out", prepared, drop_invalid=True, **settings)
    assert sum(made.documents.values()) == len(GOOD)
    assert read_report(made.directory)[-2:] == ["dropped of a.jsonl: 1 empty", f"dropped of a.jsonl: 1 {reason}"]


@pytest.mark.parametrize("line", OTHER_BAD_LINES, ids=lambda line: ascii(line[:20]))
def test_other_bad_lines_are_refused_too(tmp_path: Path, prepared: Prepared, line: bytes) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*GOOD, line]))
    _refused(source, tmp_path, prepared, r"a\.jsonl:41 of .* in data\.sources is (not|without)")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n' * 50])
def test_a_file_without_text_is_refused(tmp_path: Path, prepared: Prepared, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.txt").write_bytes(content[:0])
    for name in ("a.jsonl", "a.txt"):
        _refused(tmp_path / name, tmp_path, prepared, r"data\.sources has no document with text in it")


def test_a_long_text_that_turns_out_bad_is_dropped_as_a_whole(tmp_path: Path, prepared: Prepared) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "aceg":
        (folder / f"{name}.txt").write_text(f"this is {name}. " * 100_000)
    (folder / "b.txt").write_bytes(b"this is b. " * 100_000 + b"caf\xe9 " + b"and on. " * 100_000)
    (folder / "d.txt").write_bytes(b"this is d. " * 100_000 + b"\xff" + b"and on. " * 100_000 + b"\xff")
    _refused(folder, tmp_path, prepared, r"b\.txt of .* is not UTF-8 text", heldout_fraction=0.5)
    made = _prepare(folder, tmp_path / "out", prepared, drop_invalid=True, heldout_fraction=0.5)
    tokenizer, found = made.open_tokenizer(), []
    for split in ("train", "heldout"):
        corpus = Corpus(made, split)  # type: ignore[arg-type] # one of the two
        assert corpus.lengths.sum() == made.tokens[split]
        found += [tokenizer.decode(corpus.read(n, 0, int(length))) for n, length in enumerate(corpus.lengths)]
    assert sorted(found) == [f"this is {name}. " * 100_000 for name in "aceg"]
    assert read_report(made.directory)[-1] == "dropped of texts: 2 not UTF-8 text"


@pytest.mark.parametrize("bad", ["train", "heldout"])
def test_a_split_that_loses_all_its_documents_is_refused(tmp_path: Path, prepared: Prepared, bad: str) -> None:
    """What cannot be read is behind the first piece, when the document has been drawn already."""
    folder = tmp_path / "texts"
    folder.mkdir()
    broken = b"this one ends badly. " * 40_000 + b"\xff"
    whole = b"this one is good. " * (1_000 if bad == "train" else 80_000)
    for name, content in (("bad", broken), ("good", whole)):
        (folder / f"{name}.txt").write_bytes(content)
    words = rf"data\.sources leaves no document for the {bad} split, since 1 could not be read.*data\.drop_invalid"
    _refused(folder, tmp_path, prepared, words, drop_invalid=True, heldout_fraction=1e-9)
    (folder / "bad.txt").write_bytes(broken[:-1])
    made = _prepare(folder, tmp_path / "out", prepared, drop_invalid=True)
    assert sum(made.documents.values()) == 2


def test_a_text_without_a_space_is_refused_above_the_limit(tmp_path: Path, prepared: Prepared) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000)
    words = r"a\.txt of .* is longer than 1,000,000 bytes \(data\.max_record_bytes\)"
    _refused(tmp_path / "a.txt", tmp_path, prepared, words, max_record_bytes=1_000_000)


@pytest.mark.parametrize("cut", [1, 9, 100])
def test_a_cut_archive_is_refused(tmp_path: Path, prepared: Prepared, cut: int) -> None:
    lines = b"\n".join(json.dumps({"text": os.urandom(30).hex()}).encode() for _ in range(3000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-cut])
    with pyarrow.CompressedOutputStream(str(tmp_path / "whole"), "zstd") as file:
        file.write(lines)
    (tmp_path / "a.jsonl.zst").write_bytes((tmp_path / "whole").read_bytes()[:-cut])
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        _refused(
            tmp_path / name, tmp_path, prepared, rf"{name} of data\.sources (cannot be read to its end|is damaged)"
        )


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, prepared: Prepared, name: str) -> None:
    (tmp_path / name).write_bytes(b"\n".join(GOOD))
    _refused(tmp_path / name, tmp_path, prepared, rf"{name} of data\.sources (cannot be read to its end|is damaged)")


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, prepared: Prepared) -> None:
    np.array([5, 6, 7, 800] * 10, "<u2").tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", np.full(10, 4), np.dtype("<u2"))
    words = r"a:0 of .* has token ids from 5 to 800, but those of data\.tokenizer go from 0 to 799"
    _refused(tmp_path / "a.bin", tmp_path, prepared, words)


def test_ids_that_were_damaged_later_are_named_when_they_are_read(corpus_of: Callable[..., Corpus]) -> None:
    corpus = corpus_of([[1, 2], [3, 1000, 4]])
    assert corpus.read(0, 0, 2).tolist() == [1, 2]
    assert corpus.read(1, 0, 1).tolist() == [3]
    with pytest.raises(DataError, match=r"train\.bin is damaged: document 1 has token ids from 4 to 1000, and the"):
        corpus.read(1, 1, 3)


def test_tokens_with_another_index_are_refused(tmp_path: Path, prepared: Prepared) -> None:
    np.array([5, 6, 7, 8] * 10, "<u2").tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", np.full(11, 4), np.dtype("<u2"))
    _refused(tmp_path / "a.bin", tmp_path, prepared, r"a\.bin has 80 bytes, but a\.idx speaks of 88")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, prepared: Prepared, name: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "zz.txt").write_text("another one")
    if name == "a.parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), folder / name)
    else:
        (folder / name).write_bytes(b"\n".join(GOOD))

    def change(line: str) -> None:
        (folder / name).touch()

    _refused(folder, tmp_path, prepared, rf"{name} of data\.sources changed while it was prepared", report=change)


_WITH_LIMIT = """
import sys
from pathlib import Path
from farspan.launch.command import main
sys.exit(main(sys.argv[1:]))
"""


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path: Path, prepared: Prepared) -> None:
    lines = (json.dumps({"text": f"line {number} of a long file, with some words " * 9}) for number in range(3000))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = tmp_path / "a.yaml"
    config.write_text(
        f"run: {{dir: r}}\nmodel: {{preset: tiny}}\ntrain: {{steps: 1, tokens_per_step: 128, sequence_length: 128}}\n"
        f"data: {{sources: [a.jsonl], directory: out, tokenizer: {prepared.tokenizer_path}, processes: 2}}\n"
    )
    command = [sys.executable, "-c", _WITH_LIMIT, "prepare", str(config)]
    full = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=_limit_files)
    assert full.returncode == 2
    assert full.stderr.splitlines() == [
        "farspan: out (data.directory) cannot be written (File too large): make room and run `farspan prepare` again, "
        "which goes on where it stopped."
    ]
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0
    assert "going on with out.partial" in again.stdout
    made = _prepare(tmp_path / "a.jsonl", tmp_path / "other", prepared, heldout_fraction=0.01)
    for name in ("train.bin", "train.idx", "heldout.bin", "dataset.json", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (made.directory / name).read_bytes()


_MEASURED = """
import sys
from pathlib import Path
from farspan.data.errors import DataError
from farspan.data.prepare import prepare
try:
    source, directory, tokenizer = (Path(word) for word in sys.argv[1:])
    prepare([str(source)], directory, tokenizer=tokenizer, vocabulary_size=1, heldout_fraction=0.1, seed=0)
except DataError as error:
    print(error)
# Not getrusage: what that says of a process counts the one that started it, too.
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.full
def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path: Path, prepared: Prepared) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b"\n".join(GOOD) + b"\n")
        file.truncate(1 << 30)  # one line of zeros, which take no room on the disk
    arguments = [str(tmp_path / "a.jsonl"), str(tmp_path / "out"), str(prepared.tokenizer_path)]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *arguments], capture_output=True, text=True, check=True)
    *_, refusal, peak = done.stdout.splitlines()
    assert refusal.startswith("a.jsonl:41 of ")
    assert "is longer than 67,108,864 bytes (data.max_record_bytes)" in refusal
    assert int(peak) < 400  # MiB: torch is not loaded, and a record may be held twice
