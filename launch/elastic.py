"""Starts the workers of one machine through torch's elastic agent, watches them and says once why they failed.

torch's agent brings the workers together (ranks, store, environment). How they end is ours: it would give a stopping
worker 30 seconds, too few for a long step and a save, and a worker whose neighbour has crashed 30 seconds too many.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

_USER_ERROR = 2  # a worker that ends with this code has printed its one line itself
_GRACE_SECONDS = 2.0  # for the ranks beside a failed one to report what they saw of it
_SECOND_SIGNAL_AFTER = 1.0  # sooner, it is the same stop delivered twice (by a shell and a scheduler, say)
_LOOK_SECONDS = 0.1
_ECHO_SECONDS = 0.05


def run_workers(
    module: str, arguments: Sequence[str], *, processes: int, stop_seconds: float, log_directory: Path
) -> int:
    """Run `processes` copies of `python -m module arguments...` on this machine until all have ended.

    Rank 0's output goes to this console as it comes. Every rank's output goes to
    `log_directory/<start time>/rank_<n>.stdout.log` and `rank_<n>.stderr.log`, with the tracebacks of all ranks.

    SIGTERM, SIGINT or SIGHUP (unless ignored, as under nohup) is passed on once, as SIGTERM; the workers then have
    `stop_seconds` to finish their step and save. A second signal ends them at once. When a worker fails, the others
    are ended within a few seconds, and the first failure is printed on stderr.

    Call it from the main thread. Workers should begin with `guard.end_with_parent()` and
    `guard.report_errors_to_launcher()`.

    Returns:
        0 when every worker ended with 0; the first failed worker's exit code if it is 1..125; 128 + the signal's
        number after a second signal, or when the stop came before the workers could handle it; else 1.
    """
    logs = log_directory / time.strftime("%Y-%m-%d_%H-%M-%S")
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="farspan-") as reports, _Signals() as signals:
        files = _WorkerFiles(logs, Path(reports))
        watch = _Watch(signals, stop_seconds)
        with _echo({files.stdout(0): sys.stdout, files.stderr(0): sys.stderr}):
            _run_agent(module, arguments, processes, files, watch)
        files.keep_tracebacks(processes)
        return _explain(watch, files)


def _run_agent(module: str, arguments: Sequence[str], processes: int, files: "_WorkerFiles", watch: "_Watch") -> None:
    # Our own handlers must outlive the start of the workers: torch replaces those of the signals named here.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    rendezvous = get_rendezvous_handler(
        # Port 0: the store takes a free one. The address is given, since a laptop's own name often does not resolve.
        RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, min_nodes=1, max_nodes=1, local_addr="localhost")
    )
    specification = WorkerSpec(
        role="worker",
        local_world_size=processes,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        # torch substitutes ${local_rank} in arguments; ours are to arrive as they are.
        args=("-u", "-m", module, *(argument.replace("$", "$$") for argument in arguments)),
        max_restarts=0,
        monitor_interval=_LOOK_SECONDS,
        local_addr="localhost",
    )
    try:
        _Agent(specification, files, watch).run()
    finally:
        rendezvous.shutdown()


class _Agent(LocalElasticAgent):
    """torch's agent for the workers of one machine, with our rules for when and how they end."""

    def __init__(self, specification: WorkerSpec, files: "_WorkerFiles", watch: "_Watch") -> None:
        super().__init__(specification, files)
        self._watch = watch

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if not self._watch.look({worker.global_rank: worker.id for worker in worker_group.workers}):
            return RunResult(WorkerState.HEALTHY)
        if any(end.code for end in self._watch.ends.values()):
            return RunResult(WorkerState.FAILED)
        return RunResult(WorkerState.SUCCEEDED, dict.fromkeys(self._watch.ends))


class _WorkerFiles(LogsSpecs):
    """Where each rank's output and its error report go."""

    def __init__(self, logs: Path, reports: Path) -> None:
        super().__init__(str(logs))
        self.logs = logs
        self._reports = reports

    @property
    def root_log_dir(self) -> str:
        return str(self.logs)

    def stdout(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.stdout.log"

    def stderr(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.stderr.log"

    def report(self, rank: int) -> Path:
        """Written by `guard.report_errors_to_launcher`; on this machine's own disk, so that file times compare."""
        return self._reports / f"rank_{rank}.json"

    def traceback(self, rank: int) -> str | None:
        """The traceback with which the rank ended, None when it left none."""
        if not self.report(rank).exists():
            return None
        return json.loads(self.report(rank).read_text())["message"]["extraInfo"]["py_callstack"]

    def keep_tracebacks(self, processes: int) -> None:
        """Add each rank's traceback to its log, where it would be if the rank had printed it."""
        for rank in range(processes):
            if (traceback := self.traceback(rank)) is not None:
                # A full disk is a likely cause of the failure; it must not hide it.
                with suppress(OSError), self.stderr(rank).open("a") as log:
                    log.write(traceback)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """torch's hook before the start: says where the streams go, and may add to the workers' environment."""
        threads = max(1, _cores() // len(envs))
        for rank, environment in envs.items():
            environment["TORCHELASTIC_ERROR_FILE"] = str(self.report(rank))
            environment.setdefault("OMP_NUM_THREADS", str(threads))  # already there when the user has set it
        return LogsDest(
            stdouts={rank: str(self.stdout(rank)) for rank in envs},
            stderrs={rank: str(self.stderr(rank)) for rank in envs},
            error_files={rank: str(self.report(rank)) for rank in envs},
        )


class _Signals:
    """Collects the requests to stop, in place of the handlers that this process had."""

    def __init__(self) -> None:
        self._received: list[tuple[signal.Signals, float]] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the user wants the run to outlive the terminal
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received.append((signal.Signals(number), time.monotonic()))

    @property
    def first(self) -> tuple[signal.Signals, float] | None:
        """The first signal and when it came (monotonic seconds)."""
        return self._received[0] if self._received else None

    @property
    def second(self) -> signal.Signals | None:
        """The first signal that came clearly after the first one."""
        later = (number for number, when in self._received if when - self._received[0][1] >= _SECOND_SIGNAL_AFTER)
        return next(later, None)


@dataclass(frozen=True)
class _End:
    """How a worker ended."""

    rank: int
    code: int  # minus the signal's number when one ended it
    last_seen: float  # alive, in seconds since the epoch
    by_us: bool


class _Watch:
    """Looks after running workers: passes signals on, ends all of them when one fails or the time to stop is over."""

    def __init__(self, signals: _Signals, stop_seconds: float) -> None:
        self.ends: dict[int, _End] = {}
        self.stop: signal.Signals | None = None  # the signal that was passed on
        self.cut_short: signal.Signals | None = None  # the second signal
        self.too_late = False
        self._signals = signals
        self._stop_seconds = stop_seconds
        self._last_look = time.time()
        self._failed_at: float | None = None
        self._killed = False

    def look(self, pids: dict[int, int]) -> bool:
        """Look at the workers (pid by rank) and act; True when all have ended."""
        now = time.time()
        for rank in pids.keys() - self.ends.keys():
            if (code := _exit_code(pids[rank])) is not None:
                self.ends[rank] = _End(rank, code, self._last_look, by_us=self._killed and code == -signal.SIGKILL)
                if code != 0 and self._failed_at is None:
                    self._failed_at = time.monotonic()
        self._last_look = now
        if len(self.ends) < len(pids):
            self._act({rank: pid for rank, pid in pids.items() if rank not in self.ends})
            return False
        if self._failed_at is not None:
            _kill(pids.values())  # what the failed ones had started
        return True

    def _act(self, running: dict[int, int]) -> None:
        if self._killed:
            return
        first = self._signals.first
        if first and not self.stop:
            self.stop = first[0]
            for pid in running.values():
                os.kill(pid, signal.SIGTERM)
            _say(
                f"{self.stop.name}: the workers finish their step and save, within {self._stop_seconds:g} s "
                "(launch.stop_seconds). A second signal ends them at once."
            )
        self.cut_short = self._signals.second
        self.too_late = first is not None and time.monotonic() - first[1] > self._stop_seconds
        failed = self._failed_at is not None and time.monotonic() - self._failed_at > _GRACE_SECONDS
        if self.cut_short or self.too_late or failed:
            # Not SIGTERM: to a worker that means "finish your step", which it cannot do without the others.
            _kill(running.values())
            self._killed = True

    def first_failure(self, files: _WorkerFiles) -> _End | None:
        """The failure that came first, of those that were not our doing.

        A traceback is dated by its file. A death without a word (a signal, `os._exit`) lies between the last two looks
        and counts from the earlier one: what the other ranks then report is its consequence.
        """
        failures = [end for end in self.ends.values() if end.code != 0 and not end.by_us]

        def when(end: _End) -> float:
            report = files.report(end.rank)
            return report.stat().st_mtime if report.exists() else end.last_seen

        return min(failures, key=when, default=None)


def _explain(watch: _Watch, files: _WorkerFiles) -> int:
    """Print why the workers ended, if not well; the exit code for it."""
    if watch.cut_short:
        _say(f"Second signal ({watch.cut_short.name}): the workers were ended at once, without saving.")
        return 128 + watch.cut_short
    if watch.too_late:
        _say("The workers did not stop in time and were ended without saving. Give them longer: launch.stop_seconds.")
        return 1
    first = watch.first_failure(files)
    if first is None:
        return 0
    if watch.stop and any(end.code == -signal.SIGTERM for end in watch.ends.values()):
        _say(f"{watch.stop.name} came before the workers were ready for it: they ended at once, without saving.")
        return 128 + watch.stop
    if first.code == _USER_ERROR:
        if watch.ends[0].code != _USER_ERROR:  # else rank 0 has said it on the console
            _say(_last_lines(files.stderr(first.rank), 1))
        return _USER_ERROR
    _say(_account(first, files))
    _say(f"Output of every rank: {files.logs}")
    return first.code if 1 <= first.code <= 125 else 1


def _account(end: _End, files: _WorkerFiles) -> str:
    traceback = files.traceback(end.rank)
    if traceback is not None:
        return f"Rank {end.rank} failed:\n{traceback}"
    if end.code == -signal.SIGKILL:
        return (
            f"Rank {end.rank} was ended by SIGKILL. If nobody sent it, it was the kernel's out-of-memory killer "
            "(`dmesg` names its victims): the run needs more host memory than this machine has left."
        )
    how = f"was ended by {signal.Signals(-end.code).name}" if end.code < 0 else f"ended with exit code {end.code}"
    words = "" if end.rank == 0 else _last_lines(files.stderr(end.rank), 20)  # rank 0's are on the console
    return f"Rank {end.rank} {how}." + (f" Its last words:\n{words}" if words else "")


def _exit_code(pid: int) -> int | None:
    """Exit code of a child, minus the signal's number if one ended it, None while it runs.

    The child is left for torch's agent to collect: until then nobody else can have its pid.
    """
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # each worker leads a group, with the processes that it started


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_lines(path: Path, count: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def _say(sentence: str) -> None:
    _write(sys.stderr, f"{sentence}\n".encode())


def _write(stream: TextIO, text: bytes) -> None:
    """Write at once. A console that is gone (`| head`, a closed terminal) must not end the run, which has its logs."""
    try:
        stream.buffer.write(text)
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


@contextmanager
def _echo(copies: dict[Path, TextIO]) -> Iterator[None]:
    """Copy what is written to files to streams, as it comes; in a thread, since a console may stand still."""
    for path in copies:
        path.touch()
    done = threading.Event()

    def copy() -> None:
        with ExitStack() as files:
            pairs = [(files.enter_context(path.open("rb")), stream) for path, stream in copies.items()]
            complete = False
            while not complete:
                complete = done.is_set()  # before the copying: it then takes all that was written
                for source, stream in pairs:
                    if news := source.read():
                        _write(stream, news)
                done.wait(_ECHO_SECONDS)

    thread = threading.Thread(target=copy, name="echo", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
