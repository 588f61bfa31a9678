import signal
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from farspan.data.errors import DataError
from farspan.data.sources import Source, list_sources
from farspan.data.text import read_document, standard_library


def _write(path: Path, content: bytes = b"text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _paths(sources: Sequence[str | Source]) -> list[Path]:
    return [file.path for listing in list_sources(sources) for file in listing.files]


def _too_long(*arguments: object) -> None:
    raise TimeoutError("the search for documents does not end")


def test_a_folder_is_searched_to_its_depths_for_the_suffixes_in_sorted_order(tmp_path: Path) -> None:
    expected = [_write(tmp_path / name) for name in ("B.TXT", "a/z/deep.py", "b.md", "c.txt")]
    _write(tmp_path / "image.png")
    assert _paths([str(tmp_path)]) == expected
    assert _paths([Source(str(tmp_path), suffixes=(".png",))]) == [tmp_path / "image.png"]


def test_a_file_is_taken_whatever_its_suffix_and_no_file_twice(tmp_path: Path) -> None:
    log = _write(tmp_path / "run.log")
    note = _write(tmp_path / "notes" / "note.txt")
    files = [file for listing in list_sources([str(log), str(tmp_path), str(note)]) for file in listing.files]
    assert [(file.path, file.name) for file in files] == [(log, "run.log"), (note, "notes/note.txt")]


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    inside = _write(corpus / "sub" / "inside.txt")
    outside = _write(tmp_path / "elsewhere" / "outside.txt")
    for number in range(8):  # walked as a tree, these would be 8 to the power of the 40 links that a path may have
        (corpus / "sub" / f"up{number}").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus / "self")
    (corpus / "other").symlink_to(outside.parent)
    (corpus / "nothing.txt").symlink_to(tmp_path / "missing.txt")
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(10)
    try:
        found = _paths([str(corpus)])
    finally:
        signal.alarm(0)
    assert found == [corpus / "other" / "outside.txt", inside]


def test_the_standard_library_is_its_own_python_sources_and_all_of_them_are_text() -> None:
    documents = standard_library()
    assert [document.path for document in documents] == _paths(["python-stdlib"])
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert all(name.endswith(".py") and "packages/" not in name for name in names)
    folder = Path(sysconfig.get_paths()["stdlib"])
    assert all(document.path == folder / document.name for document in documents)
    assert sum(len(read_document(document.path)) for document in documents) > 5_000_000


def test_reading_keeps_every_character(tmp_path: Path) -> None:
    content = "\ufeff \tone\r\ntwo\rthree\n\x00\n\n"
    assert read_document(_write(tmp_path / "file.txt", content.encode())) == content


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "latin.txt", b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text \(byte 3\).*data\.sources"):
        read_document(path)


@pytest.mark.parametrize("sources", [[], ["missing"], ["empty"], ["full", "empty"]])
def test_a_source_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "full" / "text.md")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.sources"):
        list_sources(sources)
