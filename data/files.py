"""Files that are there as a whole or not at all."""

import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all, whatever happens meanwhile."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    flush_folder(path.parent)


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file, likewise."""
    beside = path.with_name(path.name + ".new")
    shutil.copyfile(source, beside)
    with beside.open("ab") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Has the system write a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
