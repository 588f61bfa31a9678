"""From the host to a device, and back, without waiting for what the device is still doing."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copies without waiting for what the device is still doing: through pinned memory."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class HostCopy:
    """A copy to the host that begins now, behind what the device was given to do, and is waited for when it is read."""

    def __init__(self, x: Tensor) -> None:
        self._copied = x
        self._done: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            self._copied = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._done = torch.cuda.current_stream(x.device).record_event()

    def read(self) -> Tensor:
        """Waits for the copy, not for what was launched behind it."""
        if self._done is not None:
            self._done.synchronize()
        return self._copied
