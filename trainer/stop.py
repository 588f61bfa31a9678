"""A request to stop that came as a signal, and the ranks' agreement to follow it at the same step."""

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class StopRequest:
    """While entered, SIGTERM and SIGINT only leave a note; the training loop reads it between steps.

        with StopRequest() as stop:
            for step in steps:
                train(step)
                if stop.agree(group, device):
                    save(step)
                    break

    Further signals change nothing. The handlers that were there before return at exit. Processes forked meanwhile
    are not asked to stop: there, SIGTERM does what it did before, so that `Process.terminate()` works, and
    SIGINT, which a terminal sends to everyone, is ignored: their parent still needs them to finish its step.

    Enter it in the main thread (Python runs signal handlers nowhere else; ValueError).

    Attributes:
        signal_name: "SIGTERM" or "SIGINT" once asked to stop, by a signal here or, after `agree`, on any rank.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Ranks may differ until they `agree`."""
        return self.signal_name is not None

    def agree(self, group: dist.ProcessGroup | None, device: torch.device | str = "cpu") -> bool:
        """Whether any rank of the group was asked to stop: the same answer on all, so that all leave at the same step.

        Collective: every rank of the group calls it once a step. It waits for the result (one integer).

        Args:
            group: the ranks that step together; None means all. A process without process groups asks nobody.
            device: where the group's backend wants its tensors: the GPU for NCCL, the CPU for gloo.
        """
        if dist.is_initialized():
            mine = signal.Signals[self.signal_name] if self.signal_name else 0
            largest = torch.tensor(mine, dtype=torch.int32, device=device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            if number := int(largest.item()):
                self.signal_name = signal.Signals(number).name
        return self.requested

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that C code had installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.signal_name = self.signal_name or signal.Signals(number).name
        elif number == signal.SIGTERM:
            signal.signal(number, self._previous[number] or signal.SIG_DFL)
            os.kill(os.getpid(), number)
