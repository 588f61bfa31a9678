"""A CUDA stream beside the one that computes, so that transfers do not wait for kernels that they do not depend on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist


class SideStream:
    """Beside the stream that is current when this is made. On a CPU, where everything is in order, it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._side = _side_stream(device) if device.type == "cuda" else None

    def active(self) -> AbstractContextManager[object]:
        """What is launched or allocated within belongs to this stream."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def follow(self) -> None:
        """Goes on when everything that was launched on the main stream is done."""
        if self._side is not None and self._main is not None:
            self._side.wait_stream(self._main)

    def lead(self) -> None:
        """Lets the main stream go on when everything that was launched here is done."""
        if self._side is not None and self._main is not None:
            self._main.wait_stream(self._side)

    def lend(self, tensor: torch.Tensor) -> None:
        """The main stream reads what was allocated here: its memory is free once that is done, whoever drops it."""
        if self._main is not None:
            tensor.record_stream(self._main)

    def mark(self) -> torch.cuda.Event | None:
        """The main stream's place now, for `after`."""
        return None if self._main is None else self._main.record_event()

    def after(self, mark: torch.cuda.Event | None) -> None:
        if self._side is not None and mark is not None:
            self._side.wait_event(mark)


def transfer_options(device: torch.device) -> Any:
    """Of a group that carries a plan's moves: its kernels are small, and go first where attention fills the GPU."""
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if device.type == "cuda" else None


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device, for a stream keeps its own memory. Its kernels are small and come first where both wait."""
    return torch.cuda.Stream(device, priority=-1)
