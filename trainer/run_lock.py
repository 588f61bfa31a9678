"""One writer to a run directory: a lock that ends with the process that holds it, however that ends."""

import fcntl
import os
import socket
import time
from pathlib import Path

_LOCK_NAME = "lock"
_ATTEMPTS = 3
_ATTEMPT_SECONDS = 0.1


class RunLockedError(RuntimeError):
    """Another process holds the run directory. The message is one line and says which."""


class RunLock:
    """Holds a run directory for this process: `with RunLock(directory): ...`, or `acquire` and `release`.

    The kernel's lock (flock) on `<directory>/lock` counts, not the file, which stays and says who holds or last held
    it: nothing is to be cleaned up after a crash or kill -9.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._file: int | None = None
        # A child would otherwise keep the lock after our death. (Programs that are executed do not inherit the file.)
        os.register_at_fork(after_in_child=self._close)

    def acquire(self) -> None:
        """Take the lock; the directory is made if missing.

        Raises:
            RunLockedError: another process, or another RunLock of this one, holds it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        file = os.open(self.directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(_ATTEMPTS):
            if _try_lock(file, fcntl.LOCK_EX):
                break
            time.sleep(_ATTEMPT_SECONDS)  # someone's `is_locked` may have it, for a moment
        else:
            os.close(file)
            raise RunLockedError(_refusal(self.directory))
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        self._file = file

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(directory: Path | str) -> str | None:
    """The line that says who holds the run directory, None when nobody does. Changes nothing and keeps nothing."""
    directory = Path(directory)
    try:
        file = os.open(directory / _LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return None if _try_lock(file, fcntl.LOCK_SH) else _refusal(directory)
    finally:
        os.close(file)


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(directory: Path) -> str:
    holder = (directory / _LOCK_NAME).read_text().strip() or "another process"
    return f"run.dir {directory} is in use by {holder}: stop that run, wait for it to end, or choose another run.dir."
