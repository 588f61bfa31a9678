"""Selections of tiles in any pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.bits import WORD, counts, members, packed, union
from farspan.kernels.index import Places, Selection, dense
from farspan.kernels.row_blocks import RowBlocks
from farspan.kernels.tiles import TILE


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Row q computes key k when block `k // block` is in the set of block `q // block`.

    `words` int32 `[B, H, blocks, words]` holds each block's set as bits, 32 a word: 32 MiB for 16 heads and 512K
    tokens. None is behind the block of rows itself.
    """

    words: Tensor
    length: int
    block: int = TILE

    def __post_init__(self) -> None:
        blocks = -(-self.length // self.block)
        if self.words.dtype != torch.int32 or self.words.shape[2:] != (blocks, -(-blocks // WORD)):
            raise ValueError(
                f"an index over {self.length} tokens has {blocks} sets of blocks, int32, got "
                f"{tuple(self.words.shape)} {self.words.dtype}"
            )

    @staticmethod
    def of(tiles: Tensor, length: int, block: int = TILE) -> BlockIndex:
        """Of bool `[B, H, blocks, blocks]`, by block of rows and block of keys; causal ones of them."""
        return BlockIndex(packed(tiles.tril()), length, block)

    @property
    def heads(self) -> int:
        return self.words.shape[1]

    @property
    def device(self) -> torch.device:
        return self.words.device

    def at(self, places: Places, heads: tuple[int, int] | None = None) -> Selection:
        first, last = heads or (0, self.heads)
        q, k = (where.long().clamp(max=self.words.shape[2] - 1) for where in (places.q_blocks, places.k_blocks))
        table = members(self.words[:, first:last, q], k).flatten(2)
        row_at, key_at = (torch.arange(len(x), device=x.device, dtype=torch.int32) for x in (q, k))
        return Selection(table, row_at * len(k), key_at, None, places.k_positions, self.block)

    def selects(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool `[B, H, rows, keys]`: whether rows compute keys, of positions."""
        q, k = ((x // self.block).clamp(max=self.words.shape[2] - 1) for x in (rows, keys))
        return members(self.words[:, :, q], k)

    def reads(self, rows: RowBlocks, kv_heads: int) -> Tensor:
        """Bool `[B, kv heads, groups, key blocks]`, see `Index`."""
        of_any = union(self.words.unflatten(1, (kv_heads, -1)).movedim(2, -1))
        blocks = torch.arange(self.words.shape[2], device=self.device)
        return rows.reads(members(of_any[:, :, rows.numbers], blocks))

    def to_dense(self) -> Tensor:
        """Bool `[B, H, length, length]`: what is computed under a causal mask."""
        return dense(self, self.length)

    def density(self) -> Tensor:
        """fp64 `[B, H]`: selected tiles over causal tiles."""
        blocks = self.words.shape[2]
        return counts(self.words).sum(-1).double() / (blocks * (blocks + 1) // 2)
