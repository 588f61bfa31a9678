"""Blocks of rows in groups, each with the blocks of keys that a mask shows it: who may read what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks import IntervalMask
from farspan.kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Block `numbers[g, i]` of rows, of group g, may see the blocks of keys from `first` to before `stop`.

    `numbers` int64 `[groups, most]`, `first` and `stop` int32 `[B or 1, groups, most]`. Where a group has fewer blocks
    than another, these see nothing.
    """

    numbers: Tensor
    first: Tensor
    stop: Tensor

    @staticmethod
    def of(groups: Sequence[np.ndarray], mask: IntervalMask, block: int, device: torch.device | str) -> RowBlocks:
        """`mask` in positions; each group has numbers of blocks of `block` positions, within the mask's rows."""
        starts = np.arange(0, mask.rows, block)
        begin, end, anchor_begin, anchor_end = (bound.cpu().numpy() for bound in mask.bounds)
        # Between its first and its last key a row may see nothing (sinks): that counts as seen.
        low, high = np.minimum(begin, anchor_begin), np.maximum(end, anchor_end)
        low, high = np.where(high > low, low, mask.rows), np.where(high > low, high, 0)
        first = np.minimum.reduceat(low, starts, 1) // block
        stop = -(-np.maximum.reduceat(high, starts, 1) // block)

        shape = len(groups), max(map(len, groups))
        numbers, present = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for group, members in enumerate(groups):
            numbers[group, : len(members)] = members
            present[group, : len(members)] = True
        stop = np.where(present, stop[:, numbers], 0)

        def put(x: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(x), device)

        return RowBlocks(put(numbers), put(first[:, numbers].astype(np.int32)), put(stop.astype(np.int32)))

    def reads(self, selected: Tensor) -> Tensor:
        """Bool `[B, heads, groups, key blocks]`: what some block of a group computes something of.

        `selected` bool `[B or 1, heads, groups, most, key blocks]`.
        """
        key = torch.arange(selected.shape[-1], device=selected.device)
        seen = (key >= self.first[..., None]) & (key < self.stop[..., None])
        return (selected & seen[:, None]).any(3)
