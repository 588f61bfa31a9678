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


def text_files(folder: Path, suffixes: Sequence[str]) -> list[Document]:
    """The files of a folder with one of the suffixes, sorted by name; it is searched to its depths, through links.

    Raises DataError when a folder cannot be listed.
    """
    return _folder(folder, tuple(suffix.lower() for suffix in suffixes))


def standard_library() -> list[Document]:
    """The `.py` sources of the running Python's standard library, without its tests, that are valid UTF-8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    # A few sources are deliberately not UTF-8.
    documents = [found for found in _folder(folder, (".py",), leave_out=_NOT_STDLIB) if _is_utf8(found.path)]
    if not documents:
        raise DataError(
            f"data.sources names {PYTHON_STDLIB}, but this Python keeps no .py sources in {folder}: "
            "name a folder of text files instead."
        )
    return documents


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
