"""A run directory has one writer; the lock ends with its holder, however that ends."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farspan.trainer.run_lock import RunLock, RunLockedError, is_locked

HOLDER = """
import os, sys, time
from farspan.trainer.run_lock import RunLock
RunLock(sys.argv[1]).acquire()
speaks = not sys.argv[2:] or os.fork() == 0
if speaks:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{process.pid}\n"
    yield process
    process.kill()
    process.wait()


def test_second_writer_is_refused_in_one_line(tmp_path, holder):
    with pytest.raises(RunLockedError) as refused:
        RunLock(tmp_path).acquire()
    line = str(refused.value)
    assert re.match(rf"run\.dir {tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since 20", line)
    assert "\n" not in line
    assert is_locked(tmp_path) == line


def test_kill_9_of_the_holder_frees_the_directory(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert is_locked(tmp_path) is None
    with RunLock(tmp_path):
        assert f"process {os.getpid()} " in str(is_locked(tmp_path))
        assert str(holder.pid) not in (tmp_path / "lock").read_text()


def test_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "and fork"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert is_locked(tmp_path) is not None
    process.kill()
    process.wait()
    os.kill(child, 0)  # still there
    assert is_locked(tmp_path) is None
    os.kill(child, 9)


def test_program_started_by_the_holder_does_not_keep_the_lock(tmp_path):
    with RunLock(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    assert is_locked(tmp_path) is None
    child.kill()
    child.wait()


def test_release_and_a_directory_that_does_not_exist_yet(tmp_path):
    directory = tmp_path / "runs" / "new"
    assert is_locked(directory) is None
    assert not directory.exists()
    lock = RunLock(directory)
    lock.acquire()
    with pytest.raises(RunLockedError):
        RunLock(directory).acquire()
    lock.release()
    lock.release()
    assert is_locked(directory) is None
    lock.acquire()
    lock.release()


def test_a_look_at_the_lock_does_not_turn_a_writer_away(tmp_path):
    looker = "import fcntl, os, sys, time\nfile = os.open(sys.argv[1], os.O_RDONLY)\nfcntl.flock(file, fcntl.LOCK_SH)\n"
    looker += "print('held', flush=True)\ntime.sleep(0.1)"
    (tmp_path / "lock").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", looker, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    RunLock(tmp_path).acquire()
    process.wait()
