"""Kept tensors in pinned host memory: out during the forward pass, back one layer ahead of the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

# Tensors are copied page by page, so that a page fits every shape. Large enough for the full bandwidth of the bus, and
# small enough that a half-empty last page does not matter.
PAGE_BYTES = 2**24


class OnHost(NamedTuple):
    """A tensor as the host holds it."""

    pages: list[Tensor]
    shape: torch.Size
    dtype: torch.dtype


class HostMemory:
    """Pages of pinned host memory for one device, allocated once and used again in every step.

    Copies in both directions run on one stream of their own, so a page that comes free can be given away at once: its
    next copy queues behind its last. Device memory is allocated on the caller's stream. What a copy reads is held until
    that stream has waited for the copy, and what a copy writes waits for that stream first.

    Make it on the rank's own device, as the current one. On a CPU copies are plain ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pages = 0
        self._free: list[Tensor] = []
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self._leaving: list[tuple[Any, tuple[Tensor, ...]]] = []
        self._newest: ref[OffloadedLayer] | None = None

    def layer(self, last: bool) -> OffloadedLayer:
        """The memory of one call of a layer, in the order of the forward pass; `last` says that none follows.

        From here on what the call before kept is on the host alone.
        """
        for event, _ in self._leaving:
            self.wait(event)
        self._leaving = []
        layer = OffloadedLayer(self, self._newest, stays=last)
        self._newest = ref(layer)
        return layer

    def send(self, tensors: tuple[Tensor, ...]) -> list[OnHost]:
        """Starts copying contiguous tensors to the host."""
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            sent = [OnHost([self._filled_page(part) for part in _parts(x)], x.shape, x.dtype) for x in tensors]
        self._leaving.append((self._stream.record_event(), tensors))
        return sent

    def fetch(self, sent: list[OnHost]) -> tuple[tuple[Tensor, ...], Any]:
        """Starts copying back to new device tensors, which may be used after `wait` for the event beside them."""
        tensors = tuple(torch.empty(x.shape, dtype=x.dtype, device=self.device) for x in sent)
        self._stream.wait_stream(self._module.current_stream())  # for whoever had this memory before
        with self._module.stream(self._stream):
            for tensor, (pages, *_) in zip(tensors, sent):
                for part, page in zip(_parts(tensor), pages, strict=True):
                    part.copy_(page[: len(part)], non_blocking=True)
        self.release(sent)
        return tensors, self._stream.record_event()

    def wait(self, event: Any) -> None:
        self._module.current_stream().wait_event(event)

    def release(self, sent: list[OnHost]) -> None:
        for tensor in sent:
            self._free += tensor.pages

    def _filled_page(self, part: Tensor) -> Tensor:
        if not self._free:
            self._free.append(torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=self.device.type == "cuda"))
            self.pages += 1
        page = self._free.pop()
        page[: len(part)].copy_(part, non_blocking=True)
        return page


class OffloadedLayer:
    """What one call of a layer keeps, on the host.

    `stays` is for the last of these layers: in the backward pass none of them comes before it and could start its
    copies back, so what it keeps never leaves the device.
    """

    def __init__(self, host: HostMemory, before: ref[OffloadedLayer] | None, stays: bool) -> None:
        self._host, self._stays = host, stays
        self._before = before  # weakly: what the layer before keeps belongs to its own graph
        self._sent: dict[str, list[OnHost]] = {}
        self._here: dict[str, tuple[tuple[Tensor, ...], Any]] = {}

    def put(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        if self._stays:
            self._here[name] = (tensors, None)
        else:
            self._sent[name] = self._host.send(tensors)

    def take(self, name: str) -> tuple[Tensor, ...] | None:
        """Also starts the copies of the layer before, which the backward pass comes to next."""
        if name not in self._sent and name not in self._here:
            return None
        self.fetch()
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        tensors, event = self._here.pop(name)
        if event is not None:
            self._host.wait(event)
        return tensors

    def fetch(self) -> None:
        """Starts copying all that is on the host back to the device."""
        for name, sent in self._sent.items():
            self._here[name] = self._host.fetch(sent)
        self._sent = {}

    def __del__(self) -> None:
        # A graph that is dropped without a backward pass gives its pages back.
        for sent in self._sent.values():
            self._host.release(sent)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The bytes of a contiguous tensor, page by page."""
    return tensor.view(-1).view(torch.uint8).split(PAGE_BYTES)
