"""Where text comes from: files, folders, and the standard library of the Python that runs."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from farspan.data.errors import DataError

PYTHON_STDLIB = "python-stdlib"
# Its own tests are left out: not every distribution ships them, and they are tables of bytes as much as text.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One text file. `name` is its path relative to its source: the same wherever the source lies on a machine."""

    path: Path
    name: str


def find_documents(sources: Sequence[str], suffixes: Sequence[str] = (".txt", ".md", ".py")) -> list[Path]:
    """The text files of all sources, source by source, sorted by name within each, no file twice.

    A source is a file (of any suffix), a folder (searched to its depths for `suffixes`, through links), or the
    word `python-stdlib`: the `.py` sources of the running Python's standard library, without its tests,
    that are valid UTF-8.
    (`./python-stdlib` names a folder of that name.)

    Raises DataError when a source does not exist, cannot be listed, or holds no file with one of the suffixes.
    """
    return [document.path for document in named_documents(sources, suffixes)]


def named_documents(sources: Sequence[str], suffixes: Sequence[str] = (".txt", ".md", ".py")) -> list[Document]:
    """As `find_documents`, with each file's name within its source."""
    if not sources:
        raise DataError(f"data.sources is empty: give files, folders or the word {PYTHON_STDLIB}.")
    found: dict[Path, Document] = {}
    for source in sources:
        for document in _documents_of(source, tuple(suffix.lower() for suffix in suffixes)):
            found.setdefault(document.path.resolve(), document)
    return list(found.values())


def read_document(path: Path) -> str:
    """The whole text of a file, line ends, byte order mark and all. Raises DataError unless it is valid UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or take it out of data.sources."
        ) from error
    except OSError as error:
        raise DataError(f"{path} of data.sources cannot be read: {error.strerror}.") from error


def _documents_of(source: str, suffixes: tuple[str, ...]) -> list[Document]:
    if source == PYTHON_STDLIB:
        return _standard_library()
    path = Path(source).expanduser()
    if path.is_file():
        return [Document(path, path.name)]
    if not path.is_dir():
        raise DataError(
            f"data.sources names {source!r}, which is no file or folder here: give a file, a folder or "
            f"the word {PYTHON_STDLIB}."
        )
    documents = _folder(path, suffixes)
    if not documents:
        raise DataError(f"data.sources names the folder {source!r}, which holds no {' or '.join(suffixes)} file.")
    return documents


def _standard_library() -> list[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    # A few sources are deliberately not UTF-8.
    documents = [found for found in _folder(folder, (".py",), leave_out=_NOT_STDLIB) if _is_utf8(found.path)]
    if not documents:
        raise DataError(
            f"data.sources names {PYTHON_STDLIB}, but this Python keeps no .py sources in {folder}: "
            "name a folder of text files instead."
        )
    return documents


def _folder(folder: Path, suffixes: tuple[str, ...], leave_out: frozenset[str] = frozenset()) -> list[Document]:
    files = _walk(folder, suffixes, leave_out)
    documents = [Document(path, path.relative_to(folder).as_posix()) for path in files]
    return sorted(documents, key=lambda document: document.name)


def _walk(folder: Path, suffixes: tuple[str, ...], leave_out: frozenset[str]) -> Iterator[Path]:
    visited = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_cannot_list):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:  # a link back up, or a second link to the same folder
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if name not in leave_out)
        paths = (Path(here, name) for name in files if name.lower().endswith(suffixes))
        yield from (path for path in paths if path.is_file())  # not pipes, nor links to nothing


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename} of data.sources cannot be listed: {error.strerror}.") from error


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
