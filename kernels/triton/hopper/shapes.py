"""Block shapes of the Hopper kernels, measured on one H200; lists are of 128 x 128 tiles."""

from __future__ import annotations

from typing import NamedTuple

from farspan.kernels.tiles import TILE


class ForwardShape(NamedTuple):
    """Consumer warpgroups, rows of each, keys of a tile, tiles in flight, and the registers of a thread by role."""

    consumers: int
    rows: int
    keys: int
    stages: int
    consumer_registers: int
    producer_registers: int

    @property
    def registers(self) -> int:
        """What a thread starts with: roles only move registers from one warpgroup to another."""
        total = self.producer_registers + self.consumers * self.consumer_registers
        return min(total, 512) // (self.consumers + 1) // 8 * 8


class OnePassShape(NamedTuple):
    """Rows of a tile, row tiles in flight, tiles of dS in flight, and by how many steps dq comes after its dS."""

    rows: int
    stages: int
    ds_stages: int
    lag: int


def forward_shape(dim: int, lists: bool) -> ForwardShape:
    if dim == 64 and not lists:
        return ForwardShape(3, 64, 64, 4, 160, 32)
    return ForwardShape(2, 64, TILE, 3 if dim == 64 else 2, 240, 24)


def one_pass_shape(dim: int, causal: bool) -> OnePassShape:
    """Causal is what has tiles along a diagonal: there key tiles wait for their turns, and a lag makes these longer."""
    if dim == 64:
        return OnePassShape(128, 3, 2, 1)
    return OnePassShape(64, 3, 2, 0 if causal else 1)


def dq_stages(dim: int) -> int:
    """Key tiles in flight."""
    return 2 if dim == 128 else 3


def dkdv_shape() -> tuple[int, int]:
    """Rows of a tile, and tiles in flight."""
    return 64, 4
