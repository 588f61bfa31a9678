"""MoBA's selections: the chunks of keys that each row computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.bits import WORD, counts, members, union
from farspan.kernels.index import Places, Selection, dense
from farspan.kernels.row_blocks import RowBlocks
from farspan.kernels.tiles import TILE


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Row q computes the keys of its chunks. `words` int32 `[B, H, words, rows]` holds the chunks as bits, 32 a word.

    Rows are whole blocks: behind `length` they have no chunk. Each row has its own chunk, and of those after it none.
    A `chunk` is a number of tokens, a multiple of the block.
    """

    words: Tensor
    length: int
    chunk: int
    block: int = TILE

    def __post_init__(self) -> None:
        blocks, chunks = -(-self.length // self.block), -(-self.length // self.chunk)
        if self.chunk % self.block or self.words.shape[2:] != (-(-chunks // WORD), blocks * self.block):
            raise ValueError(
                f"an index of chunks of {self.chunk} tokens over {self.length} in blocks of {self.block} got words "
                f"{tuple(self.words.shape)}"
            )

    @cached_property
    def of_blocks(self) -> Tensor:
        """int32 `[B, H, words, blocks]`: the chunks that some row of a block has."""
        return union(self.words.unflatten(3, (-1, self.block)))

    @property
    def heads(self) -> int:
        return self.words.shape[1]

    @property
    def device(self) -> torch.device:
        return self.words.device

    def at(self, places: Places, heads: tuple[int, int] | None = None) -> Selection:
        first, last = heads or (0, self.heads)
        q = places.q_blocks.long().clamp(max=self.of_blocks.shape[3] - 1)
        rows = (q[:, None] * self.block + torch.arange(self.block, device=q.device)).flatten()[: places.rows]
        chunks = torch.arange(-(-self.length // self.chunk), device=q.device)
        table = members(self.of_blocks[:, first:last, :, q].transpose(2, 3), chunks).flatten(2)
        row_at = torch.arange(len(q), device=q.device, dtype=torch.int32) * len(chunks)
        key_at = self._chunk_of(places.k_blocks.long() * self.block).int()
        of_rows = self.words[:, first:last, :, rows]
        return Selection(table, row_at, key_at, None, places.k_positions, self.block, of_rows)

    def selects(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool `[B, H, rows, keys]`: whether rows compute keys, of positions."""
        return members(self.words[..., rows].transpose(2, 3), self._chunk_of(keys))

    def reads(self, rows: RowBlocks, kv_heads: int) -> Tensor:
        """Bool `[B, kv heads, groups, key blocks]`, see `Index`."""
        of_any = union(self.of_blocks.unflatten(1, (kv_heads, -1)).movedim(2, -1)).transpose(2, 3)
        chunks = self._chunk_of(torch.arange(self.of_blocks.shape[3], device=self.device) * self.block)
        return rows.reads(members(of_any[:, :, rows.numbers], chunks))

    def to_dense(self) -> Tensor:
        """Bool `[B, H, length, length]`: what is computed under a causal mask."""
        return dense(self, self.length)

    def density(self) -> Tensor:
        """fp64 `[B, H]`: tiles of which something is computed, over causal tiles."""
        blocks, of_chunk = self.of_blocks.shape[3], self.chunk // self.block
        own = torch.arange(blocks, device=self.words.device) % of_chunk + 1
        tiles = (counts(self.of_blocks.transpose(2, 3)) - 1) * of_chunk + own
        return tiles.sum(-1).double() / (blocks * (blocks + 1) // 2)

    def _chunk_of(self, positions: Tensor) -> Tensor:
        """The last chunk for positions behind the row."""
        return positions.clamp(max=self.length - 1) // self.chunk
