"""Steps that other processes make ahead: the same, in any order, and no failure hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from farspan.data.prefetch import Prefetch, PrefetchError


def squares(step: int) -> list[np.ndarray]:
    return [np.full(100_000, step * step)]  # more than a pipe holds


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_same_with_any_number_of_processes(workers: int) -> None:
    prefetch = Prefetch(squares, workers, patience=30)
    for step in (5, 5, 6, 7, 8, 9, 20, 21, 3, 4):
        assert np.array_equal(prefetch(step)[0], squares(step)[0])
    prefetch.close()


def test_steps_are_made_elsewhere_and_ahead() -> None:
    prefetch = Prefetch(lambda step: (os.getpid(), time.monotonic()), 2, patience=30)
    first, second = prefetch(0)[0], prefetch(1)[0]
    asked = time.monotonic()
    assert len({os.getpid(), first, second}) == 3
    time.sleep(0.5)
    assert prefetch(2)[0] == first
    assert prefetch(2)[1] > asked  # asked for once more, after it was handed out
    assert prefetch(3)[1] < asked + 0.5
    prefetch.close()


def test_a_failure_comes_with_its_traceback() -> None:
    def fail(step: int) -> int:
        return 1 // (3 - step)

    prefetch = Prefetch(fail, 2, patience=30)
    assert prefetch(2) == 1
    with pytest.raises(PrefetchError, match=r"(?s)the rows of step 4 .*in fail.*ZeroDivisionError"):
        prefetch(3)
    prefetch.close()


def test_a_slow_process_is_given_up() -> None:
    prefetch = Prefetch(lambda step: time.sleep(60), 1, patience=0.2)
    with pytest.raises(PrefetchError, match=r"rows of step 1 were not read within 0.2 s .*parallel.timeout_seconds"):
        prefetch(0)
    prefetch.close()


def test_a_dead_process_is_an_error() -> None:
    prefetch = Prefetch(lambda step: os.getpid(), 2, patience=30)
    os.kill(prefetch(0), signal.SIGKILL)
    with pytest.raises(PrefetchError, match=r"reads the rows of step \d+ \(data.workers\), died with exit code -9"):
        list(map(prefetch, range(1, 20)))
    prefetch.close()


def test_signals_that_ask_training_to_stop_change_nothing() -> None:
    prefetch = Prefetch(lambda step: os.getpid(), 1, patience=30)
    for step, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        os.kill(prefetch(step), number)
    assert prefetch(10) == prefetch(11)
    prefetch.close()
    prefetch.close()


def test_a_program_ends_without_closing() -> None:
    program = (
        "from farspan.data.prefetch import Prefetch\n"
        "prefetch = Prefetch(lambda step: step, 2, 30)\n"
        "assert prefetch(3) == 3\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_processes_end_with_the_one_that_started_them() -> None:
    ours, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        prefetch = Prefetch(lambda step: os.getpid(), 3, patience=30)
        os.write(theirs, " ".join(str(prefetch(step)) for step in range(3)).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(word) for word in os.read(ours, 1000).split()]
    assert len(set(pids)) == 3
    for _ in range(100):
        alive = [pid for pid in pids if os.path.exists(f"/proc/{pid}") and _state(pid) != "Z"]
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {alive}")


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
