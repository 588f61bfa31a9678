"""Transfers under way: what is said and done when a peer does not send or receive what the plan says."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from functools import cache
from threading import Thread

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType

from farspan.parallel.plan import Direction

_LOOK_SECONDS = 1.0
_PATIENCE = 0.95  # of a group's timeout, at the end of which torch's own watchdog aborts the process


class TransferError(RuntimeError):
    """A peer died, hangs or is later than the group's timeout; the message names plan, stage and peer."""


class Transfer:
    """Sends and receives that a rank posts together, at stage `start`, and waits for at stage `stop`."""

    def __init__(self, plan: str, direction: Direction, start: int, stop: int) -> None:
        self.plan, self.direction, self.start, self.stop = plan, direction, start, stop
        self._works: list[dist.Work] = []

    def post(self, operations: list[dist.P2POp]) -> None:
        """Returns at once. TransferError when a peer is known to be gone."""
        device, group = operations[0].tensor.device, operations[0].group
        self._backend = group._get_backend(device)
        self._peers = [("send to" if x.op is dist.isend else "receive from", x.peer) for x in operations]
        self._posted = time.monotonic()
        if device.type == "cuda":
            _watch(device).add(self)  # before it is posted: NCCL waits there for a peer that it has not met yet
        try:
            self._works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self.error() from error

    def wait(self) -> None:
        """TransferError when it was in vain. On a GPU it is the current stream that waits, and `Watch` that notices."""
        for index, work in enumerate(self._works):
            try:
                work.wait()
            except RuntimeError as error:
                if len(self._works) == len(self._peers):  # NCCL has one work for all
                    self._peers = [self._peers[index]]
                raise self.error() from error

    def over(self) -> bool:
        """Whether NCCL is done with it; also when it has failed."""
        return bool(self._works) and all(work.is_completed() for work in self._works)

    def failed(self) -> bool:
        return self._backend.get_error() != ErrorType.SUCCESS

    def late(self) -> bool:
        return time.monotonic() - self._posted > _PATIENCE * self._backend.options._timeout.total_seconds()

    def error(self) -> TransferError:
        return TransferError(
            f"rank {dist.get_rank()} waited {time.monotonic() - self._posted:.1f} s in vain to "
            f"{' and to '.join(f'{what} rank {peer}' for what, peer in self._peers)}, posted at stage {self.start} and "
            f"due at stage {self.stop} of the {self.direction} pass of plan {self.plan}; that rank died, hangs or is "
            "late: look at its output first (the groups' timeout, parallel.timeout_seconds, is how late it may be)"
        )


class Watch:
    """Ends the process when a transfer on a GPU is in vain.

    There, waiting holds up a stream and not the host, which goes on until it sits in a CUDA call, where no exception
    reaches it. torch's watchdog would end the process too, a little later and without a word of the plan.
    """

    def __init__(self) -> None:
        self._open: deque[Transfer] = deque()

    def add(self, transfer: Transfer) -> None:
        self._open.append(transfer)

    def look(self) -> Transfer | None:
        """The oldest transfer, if it is in vain; else takes a second."""
        over = []
        while self._open and self._open[0].over():
            over.append(self._open.popleft())
        if self._open and self._open[0].late():
            return self._open[0]
        time.sleep(_LOOK_SECONDS)  # meanwhile torch's watchdog marks the group of what is over because it failed
        oldest = over[0] if over else self._open[0] if self._open else None
        return oldest if oldest is not None and oldest.failed() else None

    def run(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else the first look would make a context on the first GPU
        while (transfer := self.look()) is None:
            pass
        try:
            sys.excepthook(TransferError, transfer.error(), None)  # to the launcher if there is one, else to stderr
        finally:
            os._exit(1)


@cache
def _watch(device: torch.device) -> Watch:
    """One a device, with its thread."""
    watch = Watch()
    Thread(target=watch.run, args=(device,), name="watch over transfers", daemon=True).start()
    return watch
