"""One writer to a directory: a lock that ends with the process that holds it, however that ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farspan.data.errors import DataError


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Holds `directory`.lock, which need not exist before and is gone afterwards.

    The kernel's lock (flock) counts, not the file, which says who holds it. Raises DataError when someone does.
    """
    path = directory.with_name(f"{directory.name}.lock")
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise DataError(
                f"{directory} (data.directory) is being prepared by {holder}: wait for it to end, or set "
                "data.directory to another one."
            ) from None
        if _is_still_there(file, path):
            break
        os.close(file)  # whoever held it has just removed it
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_still_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
