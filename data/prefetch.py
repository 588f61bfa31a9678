"""Processes that make what coming steps need while training computes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")

_AHEAD = 2  # steps that each process makes ahead of the one that is asked for


class PrefetchError(RuntimeError):
    """A process failed, died or was too slow; the message says which step, and holds its traceback."""


class Prefetch(Generic[Made]):
    """`make(step)`, made ahead by `workers` processes; with none of them it is called here.

    The processes are forked, so that they have what `make` reads without copying it, and take turns: step s is made by
    number s modulo `workers`. Nothing that `make` returns depends on how many there are. It must not touch a GPU.
    """

    def __init__(self, make: Callable[[int], Made], workers: int, patience: float) -> None:
        """`patience`: seconds after which a process that has not answered is given up."""
        self._make, self._patience = make, patience
        self._asked: set[int] = set()
        self._made: dict[int, Made] = {}
        self._workers: list[tuple[BaseProcess, Connection]] = []
        # At exit too, and before multiprocessing sends SIGTERM, which they ignore, and waits for them.
        self._finalize = Finalize(self, _end, (self._workers,), exitpriority=0)
        for _ in range(workers):
            self._start()

    def __call__(self, step: int) -> Made:
        if not self._workers:
            return self._make(step)
        for coming in range(step, step + _AHEAD * len(self._workers)):
            if coming not in self._asked and coming not in self._made:
                self._asked.add(coming)
                self._send(coming)
        while step not in self._made:
            self._receive(step)
        made = self._made.pop(step)
        self._made = {other: rows for other, rows in self._made.items() if other > step}
        return made

    def close(self) -> None:
        self._finalize()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        # A process ends when the last copy of our end of its pipe is closed, and so must not keep any.
        inherited = [ours, *(pipe for _, pipe in self._workers)]
        process = context.Process(target=_serve, args=(self._make, theirs, inherited), daemon=True, name="farspan-rows")
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def _send(self, step: int) -> None:
        process, pipe = self._workers[step % len(self._workers)]
        try:
            pipe.send(step)
        except OSError as error:
            raise self._dead(process, step) from error

    def _receive(self, step: int) -> None:
        """The next answer of the process that makes `step`, which may be one for an earlier question."""
        process, pipe = self._workers[step % len(self._workers)]
        try:
            if not pipe.poll(self._patience):
                raise PrefetchError(
                    f"the rows of step {step + 1} were not read within {self._patience:g} s by process {process.pid}; "
                    "raise parallel.timeout_seconds, or data.workers"
                )
            answered, made, failure = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead(process, step) from error
        self._asked.remove(answered)
        if failure is not None:
            raise PrefetchError(f"the rows of step {answered + 1} could not be read:\n{failure}")
        self._made[answered] = made

    def _dead(self, process: BaseProcess, step: int) -> PrefetchError:
        process.join(1)
        return PrefetchError(
            f"process {process.pid}, which reads the rows of step {step + 1} (data.workers), died with exit code "
            f"{process.exitcode}"
        )


def _end(workers: list[tuple[BaseProcess, Connection]]) -> None:
    while workers:
        process, pipe = workers.pop()
        pipe.close()
        process.kill()
        process.join()


def _serve(make: Callable[[int], Any], pipe: Connection, inherited: list[Connection]) -> None:
    # What asks a training process to stop is not for these, though a terminal or Slurm sends it to all: they end with
    # the process, which finishes its step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for other in inherited:
        other.close()
    try:
        while True:
            step = pipe.recv()
            made, failure = None, None
            try:
                made = make(step)
            except Exception:
                failure = traceback.format_exc()
            pipe.send((step, made, failure))
    except (EOFError, OSError):  # the training process is gone
        os._exit(0)
