"""XAttention and MoBA where several ranks share a row.

Each rank chooses for the blocks of rows that it holds, by products of one shape, so that a block's choice is the same
whoever holds it; then all learn the choices of all, as bits. XAttention needs all keys of the row on each rank, MoBA
the sum of each block's keys.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from farspan.kernels import IntervalMask, to_device
from farspan.kernels.block_index import BlockIndex
from farspan.kernels.chunk_index import ChunkIndex
from farspan.kernels.estimate.moba import ChunkSight, block_sums, chunks_count, moba
from farspan.kernels.estimate.settings import MoBA, XAttention
from farspan.kernels.estimate.xattention import CellSight, cells_count, xattention
from farspan.kernels.index import Places
from farspan.kernels.tiles import TILE
from farspan.parallel.orders import Order


class XAttentionEstimator:
    """`Estimator` by XAttention."""

    def __init__(
        self,
        order: Order,
        mask: IntervalMask,
        settings: XAttention,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device | str,
    ) -> None:
        self.settings, self.length = settings, mask.rows
        self._shares = _Shares(order, rank, group, device)
        self._counts = self._shares.held(cells_count(mask, settings.stride))
        self._sight = CellSight.of(mask, self._shares.numbers, settings.stride, device)

    def __call__(self, q: Tensor, k: Tensor, scale: float, _: object) -> tuple[BlockIndex, None]:
        keys = self._shares.of_all(self._shares.blocks(torch.where(self._counts, k, 0)))
        words = xattention(self._shares.blocks(q), keys, self._sight, self.settings, scale)
        whole = self._shares.of_all(words).permute(1, 2, 0, 3).contiguous()
        return BlockIndex(whole, self.length), None


class MoBAEstimator:
    """`Estimator` by MoBA."""

    def __init__(
        self,
        order: Order,
        mask: IntervalMask,
        settings: MoBA,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device | str,
    ) -> None:
        self.settings, self.length = settings, mask.rows
        self._shares = _Shares(order, rank, group, device)
        self._counts = self._shares.held(chunks_count(mask, settings.chunk))
        self._sight = ChunkSight.of(mask, self._shares.numbers, settings.chunk, device)

    def __call__(self, q: Tensor, k: Tensor, scale: float, _: object) -> tuple[ChunkIndex, None]:
        sums = self._shares.of_all(block_sums(self._shares.blocks(torch.where(self._counts, k, 0))))
        words = moba(self._shares.blocks(q), sums, self._sight, self.settings)
        whole = self._shares.of_all(words).permute(1, 2, 3, 0, 4).flatten(3)
        return ChunkIndex(whole, self.length, self.settings.chunk), None


class _Shares:
    """The blocks of 128 positions that this rank holds, by `numbers`, and those of all; ValueError where an order tears
    them apart. What belongs to blocks has them as its first dim.
    """

    def __init__(self, order: Order, rank: int, group: dist.ProcessGroup | None, device: torch.device | str) -> None:
        by_rank = []
        for positions in order.positions:
            Places.of(positions, positions)
            by_rank.append(positions[::TILE] // TILE)
        every = np.concatenate(by_rank)
        where = np.argsort(every, kind="stable")[: -(-order.length // TILE)]
        self.numbers, self._group, self._device = by_rank[rank], group, device
        self._order, self._rank = order, rank
        self._where = to_device(torch.from_numpy(where), device)

    def held(self, of_positions: np.ndarray) -> Tensor:
        """Bool `[B or 1, slots, 1, 1]` of what is known of all positions `[B or 1, length]`; false for padding."""
        positions = self._order.positions[self._rank]
        mine = of_positions[:, np.minimum(positions, self._order.length - 1)] & self._order.real(self._rank)
        return to_device(torch.from_numpy(mine[..., None, None]), self._device)

    def blocks(self, x: Tensor) -> Tensor:
        """`[blocks, B, TILE, heads, D]` of this rank's `[B, slots, heads, D]`: a view where its blocks are whole."""
        missing = -x.shape[1] % TILE
        x = functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.unflatten(1, (-1, TILE)).movedim(1, 0)

    def of_all(self, mine: Tensor) -> Tensor:
        """Of this rank's blocks' the whole row's, in the row's order; collective."""
        if self._group is not None:
            mine = mine.contiguous()
            whole = mine.new_empty(self._group.size() * len(mine), *mine.shape[1:])
            dist.all_gather_into_tensor(whole, mine, group=self._group)
            mine = whole
        return mine[self._where]
