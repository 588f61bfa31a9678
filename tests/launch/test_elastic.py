"""`run_workers`: what reaches the console and the logs, who is blamed for a failure, and how a stop goes."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from farspan.launch.elastic import _echo, run_workers

WORKERS = Path(__file__).parent / "workers"


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def logs(directory: Path, stream: str) -> list[str]:
    """What each rank wrote, by rank."""
    return [path.read_text() for path in sorted(directory.glob(f"*/rank_*.{stream}.log"))]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs two workers from this process: (module, arguments) -> exit code."""
    monkeypatch.chdir(WORKERS)

    def start(module: str, *arguments: str) -> int:
        return run_workers(module, arguments, processes=2, stop_seconds=5, log_directory=tmp_path / "logs")

    return start


@contextmanager
def launcher(directory: Path, stop_seconds: float, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher of two workers in a process (and a process group) of its own."""
    command = [sys.executable, "launcher.py", str(directory), "2", str(stop_seconds), module, *arguments]
    process = subprocess.Popen(
        command, cwd=WORKERS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers_ready(directory: Path) -> bool:
    return [text[:5] for text in logs(directory, "stdout")] == ["ready", "ready"]


def test_console_shows_rank_0_unchanged_and_logs_keep_every_rank(run, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    assert run("greeting", "a b", "${local_rank} $$ $HOME") == 0
    console = capfdbinary.readouterr()
    said = "rank {} of 2, threads 3, arguments ['a b', '${{local_rank}} $$ $HOME']\n"
    assert console.out.decode() == said.format(0)
    assert console.err == b"step 1\rstep 2 of rank 0"  # torch says nothing of its own
    assert logs(tmp_path / "logs", "stdout") == [said.format(0), said.format(1)]


def test_last_words_reach_the_console(tmp_path):
    console = io.TextIOWrapper(io.BytesIO())
    log = tmp_path / "log"
    with _echo({log: console}):
        log.write_text("last words")
    assert console.buffer.getvalue() == b"last words"  # type: ignore[attr-defined]


def test_number_of_threads_that_the_user_set_is_kept(run, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run("greeting") == 0
    assert "threads 5" in capfd.readouterr().out


def test_logs_of_an_earlier_start_are_kept(run, tmp_path, monkeypatch):
    for start in ("2026-01-01_00-00-00", "2026-01-01_00-00-01"):
        monkeypatch.setattr(time, "strftime", lambda _, start=start: start)
        run("greeting")
    assert len(logs(tmp_path / "logs", "stdout")) == 4


def test_first_failure_is_printed_once_even_when_its_consequence_ends_sooner(run, tmp_path, capfd):
    assert run("failing", "raise", str(tmp_path)) == 1
    console = capfd.readouterr().err
    assert console.startswith("Rank 1 failed:\nTraceback (most recent call last):\n")
    assert console.count("ValueError: the cause") == 1
    assert "the consequence" not in console
    assert console.count("\n") < 12
    assert console.splitlines()[-1] == f"Output of every rank: {next((tmp_path / 'logs').iterdir())}"
    consequence, cause = logs(tmp_path / "logs", "stderr")
    assert "ConnectionError: the consequence" in consequence
    assert "ValueError: the cause" in cause


def test_stuck_neighbour_of_a_failed_rank_is_ended(run, tmp_path, capfd):
    begin = time.monotonic()
    assert run("failing", "raise, other stuck", str(tmp_path)) == 1
    assert time.monotonic() - begin < 10
    assert "ValueError: the cause" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("_exit", 3, "Rank 1 ended with exit code 3."),
        ("SIGKILL", 1, "Rank 1 was ended by SIGKILL. If nobody sent it, it was the kernel's out-of-memory killer"),
        ("SIGSEGV", 1, "Rank 1 was ended by SIGSEGV. Its last words:\nFatal Python error: Segmentation fault"),
    ],
)
def test_silent_death_is_named_and_ends_the_others(run, tmp_path, capfd, how, code, words):
    assert run("failing", how, str(tmp_path)) == code
    console = capfd.readouterr().err
    assert console.startswith(words)
    assert "the consequence" not in console


@pytest.mark.parametrize("how", ["refuse", "both refuse"])
def test_one_line_of_a_refused_configuration_is_all_that_is_printed(run, tmp_path, capfd, how):
    assert run("failing", how, str(tmp_path)) == 2
    assert capfd.readouterr().err == "train.steps is -1; it must be positive\n"


def test_module_that_does_not_exist_is_named(run, capfd):
    assert run("no_such_worker") == 1
    assert "No module named no_such_worker" in capfd.readouterr().err


def test_interrupt_of_the_whole_terminal_lets_the_workers_save(tmp_path):
    with launcher(tmp_path, 30, "stopping", "1.5") as process:
        wait_until(lambda: workers_ready(tmp_path))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGTERM)  # the same stop, delivered twice
        output, errors = process.communicate(timeout=90)
    assert process.returncode == 0
    assert output == "ready\nsaved after ['SIGTERM']\n"
    assert logs(tmp_path, "stdout")[1] == "ready\nsaved after ['SIGTERM']\n"
    assert errors.startswith("SIGINT: the workers finish their step and save, within 30 s")
    assert errors.count("\n") == 1


@pytest.fixture
def default_hangup():
    """Also where the tests run under nohup, whose children ignore the signal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_terminal_that_is_closed_lets_the_workers_save(tmp_path, default_hangup):
    with launcher(tmp_path, 30, "stopping", "0.5") as process:
        wait_until(lambda: workers_ready(tmp_path))
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=90) == 0
    assert logs(tmp_path, "stdout") == ["ready\nsaved after ['SIGTERM']\n"] * 2


def test_second_signal_ends_at_once(tmp_path):
    ways = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
    with ExitStack() as started:
        launchers = [
            started.enter_context(launcher(tmp_path / number.name, 300, "stopping", "300")) for number, _ in ways
        ]
        for process, (number, code) in zip(launchers, ways, strict=True):
            wait_until(lambda number=number: workers_ready(tmp_path / number.name))
            process.send_signal(signal.SIGTERM)
            time.sleep(1.2)
            process.send_signal(number)
            _, errors = process.communicate(timeout=5)
            assert process.returncode == code
            assert f"Second signal ({number.name})" in errors


def test_workers_that_do_not_stop_in_time_are_ended(tmp_path):
    with launcher(tmp_path, 0.5, "stopping", "300") as process:
        wait_until(lambda: workers_ready(tmp_path))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=5)
    assert process.returncode == 1
    assert "launch.stop_seconds" in errors.splitlines()[-1]


def test_stop_that_comes_too_early_to_save_does_not_count_as_success(tmp_path):
    with launcher(tmp_path, 300, "blocked", "sleep") as process:
        wait_until(lambda: sum("blocked" in text for text in logs(tmp_path, "stdout")) == 2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "without saving" in errors.splitlines()[-1]
