"""Workers end with their launcher, and leave word of their errors."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def python(program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("start", ["farspan", "torchrun"])
def test_kill_9_of_the_launcher_leaves_no_worker(tmp_path, start):
    if start == "farspan":
        command = ["launcher.py", str(tmp_path), "2", "300", "blocked", "receive"]
    else:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--redirects=3"]
        command += [f"--log-dir={tmp_path}", "blocked.py", "sleep"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # what a killed launcher leaves there goes with the test
    launcher = subprocess.Popen([sys.executable, *command], cwd=WORKERS, stderr=subprocess.DEVNULL, env=environment)

    def outputs() -> list[str]:
        return [path.read_text() for path in tmp_path.rglob("*stdout.log")]

    try:
        wait_until(lambda: sum("blocked" in text for text in outputs()) == 2, 30)
        workers = [int(text.split()[1]) for text in outputs()]
        assert all(alive(pid) for pid in workers)
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers), 3)


def test_launcher_that_died_before_the_worker_began_is_noticed():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    worker = python(f"from farspan.launch.guard import end_with_parent; end_with_parent({gone.pid}); print('goes on')")
    output, errors = worker.communicate(timeout=10)
    assert (worker.returncode, output) == (1, "")
    assert f"process {gone.pid}" in errors


def test_watching_thread_ends_a_process_without_prctl():
    child = "import os, sys; sys.platform = 'other'\n"
    child += "from farspan.launch.guard import end_with_parent; end_with_parent(); print(os.getpid(), flush=True)\n"
    child += "import time; time.sleep(600)"
    parent = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(pid), 3)


RAISES = "from farspan.launch.guard import report_errors_to_launcher as report; report(); {}['key']"


def test_uncaught_exception_goes_to_the_launcher_and_not_to_the_console(tmp_path):
    worker = python(RAISES, TORCHELASTIC_ERROR_FILE=str(tmp_path / "report.json"))
    _, errors = worker.communicate(timeout=10)
    assert (worker.returncode, errors) == (1, "")
    message = json.loads((tmp_path / "report.json").read_text())["message"]
    assert message["message"] == "KeyError: 'key'"
    assert message["extraInfo"]["py_callstack"].startswith("Traceback")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_without_a_launcher_the_traceback_is_printed():
    worker = python(RAISES, TORCHELASTIC_ERROR_FILE="")
    _, errors = worker.communicate(timeout=10)
    assert worker.returncode == 1
    assert errors.endswith("KeyError: 'key'\n")


def test_exit_codes_pass():
    worker = python(
        "from farspan.launch.guard import report_errors_to_launcher as report; report(); raise SystemExit(2)"
    )
    assert worker.wait(timeout=10) == 2
