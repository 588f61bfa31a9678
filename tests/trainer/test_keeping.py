"""`memory.keep_layers: auto` takes what a device has, keeps a reserve, and is the same on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

from farspan.models.recompute import Recomputation
from farspan.trainer.callbacks.keeping import Keeping

pytestmark = pytest.mark.distributed

LAYERS, LAYER_BYTES, TOTAL = 12, 100, 2000  # so that the reserve is the size of a layer


class Device:
    """A GPU on which a step takes `base`, and `LAYER_BYTES` for each layer that keeps everything, but for a few."""

    def __init__(self, base: int, free_layers: int = 0) -> None:
        self.base, self.free_layers = base, free_layers
        self.held = self.cached = 0

    def memory_allocated(self) -> int:
        return self.held

    def empty_cache(self) -> None:
        self.cached = 0

    def mem_get_info(self) -> tuple[int, int]:
        return TOTAL - self.cached, TOTAL

    def step(self, kept: int, layer: nn.Module) -> None:
        """A forward pass with gradients, and one without."""
        self.held = self.base
        layer(torch.zeros(()))
        self.cached = max(self.cached, self.base + LAYER_BYTES * max(0, kept - self.free_layers))
        self.held = 0
        with torch.no_grad():
            layer(torch.zeros(()))


class KeepingLayer(nn.Module):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.device.held += LAYER_BYTES if torch.is_grad_enabled() else 5 * LAYER_BYTES
        return x


def numbers(rank: int, world: int, devices: list[tuple[int, int]], steps: int) -> tuple[list[int], list[str]]:
    """The number of layers that keep everything in each step, and what was reported; `devices` are (base, free)."""
    device = Device(*devices[rank])
    layers = nn.ModuleList([nn.Identity()] * (LAYERS - 1) + [KeepingLayer(device)])
    recomputation = Recomputation("selective", keep_layers=1)
    reports: list[str] = []
    model: Any = SimpleNamespace(layers=layers, run_layers=recomputation)
    trainer: Any = SimpleNamespace(mesh=SimpleNamespace(control=dist.group.WORLD))
    found = []
    names = ("memory_allocated", "empty_cache", "mem_get_info")
    with mock.patch.multiple(torch.cuda, **{name: getattr(device, name) for name in names}):
        keeping = Keeping(model, reports.append)
        for _ in range(steps):
            found.append(recomputation.keep_layers)
            device.step(found[-1], layers[-1])
            keeping.after_step(trainer, mock.Mock())
    return found, reports


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ((1000, 0), [1, 1, 9, 9]),  # 1000 + 9 x 100 leaves 100, the reserve
        ((1001, 0), [1, 1, 8, 8]),
        ((1000, 2), [1, 1, 10, 11, 11]),  # one more than the first measurement promised
        ((1850, 0), [1, 1, 0, 0]),  # the reserve is not free with one
        ((100, 0), [1, 1, LAYERS, LAYERS]),
    ],
)
def test_as_many_layers_as_leave_the_reserve(pool: Pool, device: tuple[int, int], expected: list[int]) -> None:
    [(found, reports)] = pool.run(1, numbers, [device], len(expected))
    assert found == expected
    assert len(reports) == 1
    assert reports[0].startswith(f"memory.keep_layers auto: the last {expected[-1]} of {LAYERS} layers keep everything")


def test_all_ranks_keep_what_fits_on_the_fullest(pool: Pool) -> None:
    both = pool.run(2, numbers, [(1000, 0), (1300, 0)], 5)
    assert [found for found, _ in both] == [[1, 1, 6, 6, 6]] * 2
