"""A preparation that is killed at any moment goes on where it stopped, to the same files."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from farspan.data import unfinished
from farspan.data.errors import DataError
from farspan.data.prepare import Prepared, prepare
from farspan.data.sources import Source
from farspan.data.text import standard_library
from farspan.data.unfinished import Unfinished

_RUN = """
import sys
from pathlib import Path
from farspan.data import unfinished
from farspan.data.prepare import prepare
from farspan.data.sources import Source
if __name__ == "__main__":
    unfinished._SECONDS = 0.0
    sources = [sys.argv[1], Source(sys.argv[2], name="long", as_one_document=True), sys.argv[3]]
    prepare(sources, Path(sys.argv[4]), tokenizer=None, vocabulary_size=500, heldout_fraction=0.1, seed=0, processes=2)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of JSON, a folder that is one long document, and text files: some megabytes."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [document.path.read_text(encoding="utf-8") for document in standard_library()[:160]]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:80]))
    for name, some in (("long", texts[80:140]), ("files", texts[140:])):
        (folder / name).mkdir()
        for number, text in enumerate(some):
            (folder / name / f"{number:03d}.py").write_text(text)
    return folder


def _command(corpus: Path, directory: Path) -> list[str]:
    return [
        sys.executable,
        "-c",
        _RUN,
        *(str(corpus / name) for name in ("lines.jsonl", "long", "files")),
        str(directory),
    ]


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("reference") / "tokens"
    subprocess.run(_command(corpus, directory), check=True, capture_output=True)
    return _contents(directory)


def _kill_often(corpus: Path, directory: Path, kills: int, total: int) -> list[int]:
    """Kills the first preparation before it has written tokens, and the others when a random share of the `total`
    bytes is there; the last one ends. Returns how many bytes each found that was to go on."""
    random_numbers, found = random.Random(kills), []
    journal = directory.with_name(f"{directory.name}.partial") / "work" / "journal.json"

    def written() -> int:
        return sum(json.loads(journal.read_text())["bytes"].values()) if journal.is_file() else 0

    for share in [0.0, *sorted(random_numbers.random() for _ in range(kills - 1))]:
        found.append(written())
        process = subprocess.Popen(_command(corpus, directory), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(0.5 * random_numbers.random())
        while process.poll() is None and written() < 0.95 * share * total:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not directory.exists()
    found.append(written())
    subprocess.run(_command(corpus, directory), check=True, capture_output=True)
    return found


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.full)])
def test_a_preparation_that_is_killed_goes_on_to_the_same_files(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path, kills: int
) -> None:
    total = len(reference["train.bin"]) + len(reference["heldout.bin"])
    found = _kill_often(corpus, tmp_path / "tokens", kills, total)
    assert _contents(tmp_path / "tokens") == reference
    assert found == sorted(found)  # nothing that was done was done again
    assert found[-1] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


class _StopError(RuntimeError):
    pass


def _prepare(sources: Sequence[str | Source], directory: Path, prepared: Prepared, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"vocabulary_size": 1, "heldout_fraction": 0.1, "seed": 0, "report": lambda line: None}
    return prepare(sources, directory, tokenizer=prepared.tokenizer_path, **(settings | changes))


@pytest.mark.parametrize("processes", [1, 2])
def test_it_goes_on_after_every_portion(
    corpus: Path, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The journal is written after each portion, and the run ends behind the first, the second, and so on."""
    sources = [str(corpus / "lines.jsonl"), Source(str(corpus / "long"), as_one_document=True), str(corpus / "files")]
    expected = _contents(_prepare(sources, tmp_path / "whole", prepared).directory)
    monkeypatch.setattr(unfinished, "_SECONDS", -1.0)
    add = Unfinished.add

    def stop(self: Unfinished, *arguments: Any) -> None:
        add(self, *arguments)
        raise _StopError

    for _ in range(100):
        monkeypatch.setattr(Unfinished, "add", stop if (tmp_path / "tokens.partial").exists() else add)
        try:
            _prepare(sources, tmp_path / "tokens", prepared, processes=processes)
            break
        except _StopError:
            monkeypatch.setattr(unfinished, "_SECONDS", -1.0)
    assert _contents(tmp_path / "tokens") == expected


def test_what_was_prepared_from_other_inputs_is_not_gone_on_with(
    corpus: Path, prepared: Prepared, tmp_path: Path
) -> None:
    source, lines = str(corpus / "files"), []
    _interrupt([source], tmp_path / "tokens", prepared)
    _prepare([source], tmp_path / "tokens", prepared, seed=5, report=lines.append)
    assert any("was prepared from other inputs (other run.seed): starting over" in line for line in lines)
    whole = _prepare([source], tmp_path / "whole", prepared, seed=5)
    assert _contents(tmp_path / "tokens") == _contents(whole.directory)


def test_what_stopped_at_a_bad_document_goes_on_without_it(
    corpus: Path, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", -1.0)
    good = (corpus / "lines.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(good + b"{\n" + good[: good.index(b"\n")])
    source, directory, lines = str(tmp_path / "a.jsonl"), tmp_path / "tokens", []
    with pytest.raises(DataError, match=r"a\.jsonl:81 .* is not JSON"):
        _prepare([source], directory, prepared)
    _prepare([source], directory, prepared, drop_invalid=True, report=lines.append)
    assert f"going on with {directory}.partial" in lines
    whole = _prepare([source], tmp_path / "whole", prepared, drop_invalid=True)
    assert _contents(directory) == _contents(whole.directory)


def test_a_folder_of_the_users_is_not_taken_for_an_unfinished_one(
    corpus: Path, prepared: Prepared, tmp_path: Path
) -> None:
    (tmp_path / "tokens.partial").mkdir()
    (tmp_path / "tokens.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"tokens\.partial is in the way"):
        _prepare([str(corpus / "files")], tmp_path / "tokens", prepared)
    assert (tmp_path / "tokens.partial" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["train.bin", "work/train.documents"])
def test_what_is_shorter_than_its_journal_says_begins_again(
    corpus: Path, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", -1.0)
    _interrupt([str(corpus / "files")], tmp_path / "tokens", prepared)
    (tmp_path / "tokens.partial" / name).write_bytes(b"")
    _prepare([str(corpus / "files")], tmp_path / "tokens", prepared)
    whole = _prepare([str(corpus / "files")], tmp_path / "whole", prepared)
    assert _contents(tmp_path / "tokens") == _contents(whole.directory)


def _interrupt(sources: Sequence[str | Source], directory: Path, prepared: Prepared) -> None:
    """Leaves an unfinished preparation behind, all of whose text is encoded."""

    def stop(line: str) -> None:
        if line.startswith("source "):
            raise _StopError

    with pytest.raises(_StopError):
        _prepare(sources, directory, prepared, report=stop)
