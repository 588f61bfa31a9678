"""Dynamic sparse selections: which tiles and which single columns of the attention matrix each head computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.bits import members
from farspan.kernels.row_blocks import RowBlocks
from farspan.kernels.tiles import TILE
from farspan.kernels.transfer import to_device


class Index(Protocol):
    """A selection for a whole packed row, in positions; what it selects is computed where the mask lets it be seen."""

    @property
    def block(self) -> int:
        """Positions of a tile's side."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def at(self, places: Places, heads: tuple[int, int] | None = None) -> Selection:
        """The part of one piece, for the query heads of the half-open range; of all heads when None."""

    def reads(self, rows: RowBlocks, kv_heads: int) -> Tensor:
        """Bool `[B, kv heads, groups, key blocks]`: of which blocks of keys some row of a group computes something.

        For a kv head by any of its query heads. Where the mask hides part of a tile, a block may be named in vain.
        """

    def selects(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool `[B, H, rows, keys]`: whether rows compute keys that they see, by int64 positions of both."""

    def density(self) -> Tensor:
        """fp64 `[B, H]`: tiles of which something is computed over causal tiles, without single columns."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows and keys of a piece are in the packed row: positions of whole blocks, each within one tile.

    `q_blocks` int32 `[row tiles]` and `k_blocks` `[key tiles]`: the block of positions that each tile of slots lies in.
    `k_positions` int32 `[N]` ascends.
    """

    q_blocks: Tensor
    k_blocks: Tensor
    k_positions: Tensor
    rows: int

    @property
    def keys(self) -> int:
        return len(self.k_positions)

    @staticmethod
    def of(
        q_positions: Sequence[int] | np.ndarray,
        k_positions: Sequence[int] | np.ndarray,
        block: int = TILE,
        device: torch.device | str = "cpu",
    ) -> Places:
        """ValueError if a tile of `block` slots, counted from the first, does not lie in one block of positions."""
        q, k = (np.asarray(positions) for positions in (q_positions, k_positions))

        def put(x: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(x.astype(np.int32)), device)

        return Places(put(_blocks(q, block)), put(_blocks(k, block)), put(k), len(q))


@dataclass(frozen=True, eq=False)
class Selection:
    """What a kernel computes of one piece, where the piece's mask is true.

    Tile (i, j) of `block` x `block` slots is selected where `table[b, h, row_at[i] + key_at[j]]` is; where that is none
    of the table's places, it is not. `table` bool `[B, H, places]`, `row_at` int32 `[row tiles]`, `key_at` int32
    `[key tiles]`. `columns` int32 `[B, H, most]`: single keys that every row computes besides, as positions, ascending;
    past all of `k_positions` `[N]` where a head has fewer. None for an index without.

    With `chunks` int32 `[B, H, words, rows]` a row computes only those of the tiles whose `key_at` is in its set of
    bits, 32 a word. An index has not both columns and these.
    """

    table: Tensor
    row_at: Tensor
    key_at: Tensor
    columns: Tensor | None
    k_positions: Tensor
    block: int
    chunks: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, row tiles, key tiles."""
        return self.table.shape[0], self.table.shape[1], len(self.row_at), len(self.key_at)

    @property
    def tiles(self) -> Tensor:
        """Bool `[B, H, row tiles, key tiles]`; large at half a million tokens."""
        return self._tiles(slice(None), slice(None))

    @cached_property
    def slots(self) -> Tensor | None:
        """Slots of the columns that are here, int32 `[B, H, most]` ascending, then the number of keys."""
        if self.columns is None:
            return None
        return slots_of(self.columns, self.k_positions).int().sort(-1).values

    def visible(self, rows: slice, keys: slice) -> Tensor:
        """Bool `[B, H, rows, keys]`: what is selected, by tile or by column."""
        row_tiles, key_tiles = (slice(x.start // self.block, -(-x.stop // self.block)) for x in (rows, keys))
        tiles, first_key = self._tiles(row_tiles, key_tiles), key_tiles.start * self.block
        by_key = tiles[..., None].expand(*tiles.shape, self.block).flatten(3)
        by_key = by_key[..., keys.start - first_key : keys.stop - first_key]
        if self.slots is not None:
            chosen = self.table.new_zeros(*self.slots.shape[:2], len(self.k_positions) + 1)
            chosen.scatter_(2, self.slots.long(), True)
            by_key = by_key | chosen[:, :, None, keys]
        row = torch.arange(rows.start, rows.stop, device=self.table.device) // self.block - row_tiles.start
        selected = by_key.index_select(2, row)
        if self.chunks is not None:
            key = torch.arange(keys.start, keys.stop, device=self.table.device)
            selected &= members(self.chunks[..., rows].transpose(2, 3), self.key_at.long()[key // self.block])
        return selected

    def _tiles(self, rows: slice, keys: slice) -> Tensor:
        at = self.row_at[rows, None] + self.key_at[keys]
        inside = (at >= 0) & (at < self.table.shape[2])
        return self.table[:, :, torch.where(inside, at, 0)] & inside


@dataclass(frozen=True, eq=False)
class VerticalSlashIndex:
    """MTraining's pattern (arXiv:2510.18830): diagonals of blocks, and single columns.

    Row q computes key k when `diagonals[..., q // block - k // block]`, or k is one of `columns`. Diagonal 0 is always
    selected, so every row has a key. `diagonals` bool `[B, H, blocks]`; `columns` int32 `[B, H, most]` ascending, and
    `length` where a head has fewer.
    """

    diagonals: Tensor
    columns: Tensor
    length: int
    block: int = TILE

    def __post_init__(self) -> None:
        blocks = -(-self.length // self.block)
        if self.diagonals.dtype != torch.bool or self.diagonals.shape[2] != blocks:
            raise ValueError(
                f"an index over {self.length} tokens has {blocks} diagonals of blocks, bool, got "
                f"{tuple(self.diagonals.shape)} {self.diagonals.dtype}"
            )

    @property
    def heads(self) -> int:
        return self.diagonals.shape[1]

    @property
    def device(self) -> torch.device:
        return self.diagonals.device

    def at(self, places: Places, heads: tuple[int, int] | None = None) -> Selection:
        first, last = heads or (0, self.heads)
        return Selection(
            self.diagonals[:, first:last],
            places.q_blocks,
            -places.k_blocks,
            self.columns[:, first:last].contiguous(),
            places.k_positions,
            self.block,
        )

    def reads(self, rows: RowBlocks, kv_heads: int) -> Tensor:
        blocks = self.diagonals.shape[2]
        diagonals = self.diagonals.unflatten(1, (kv_heads, -1)).any(2)
        # A matrix of tiles, whose row i is that of block blocks - 1 - i: the diagonals turned round, one further each.
        matrix = torch.nn.functional.pad(diagonals.flip(-1), (0, blocks - 1)).unfold(-1, blocks, 1)
        of_columns = torch.where(self.columns < self.length, self.columns // self.block, blocks).long()
        with_column = diagonals.new_zeros(*diagonals.shape[:2], blocks + 1)
        with_column.scatter_(2, of_columns.unflatten(1, (kv_heads, -1)).flatten(2), True)
        return rows.reads(matrix[:, :, blocks - 1 - rows.numbers] | with_column[:, :, None, None, :-1])

    def selects(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool `[B, H, rows, keys]`: whether rows compute keys, of positions."""
        distance = rows[:, None] // self.block - keys // self.block
        inside = (distance >= 0) & (distance < self.diagonals.shape[2])
        by_tile = self.diagonals[:, :, torch.where(inside, distance, 0)] & inside
        wanted = keys.int().expand(*self.columns.shape[:2], -1).contiguous()
        at = torch.searchsorted(self.columns, wanted)
        found = self.columns.gather(2, at.clamp(max=self.columns.shape[2] - 1)) == wanted
        return by_tile | found[:, :, None]

    def to_dense(self) -> Tensor:
        """Bool `[B, H, length, length]`: what is computed under a causal mask."""
        return dense(self, self.length)

    def density(self) -> Tensor:
        """fp64 `[B, H]`: selected tiles over causal tiles; columns are not tiles, see `column_counts`."""
        blocks = self.diagonals.shape[2]
        tiles = torch.arange(blocks, 0, -1, device=self.diagonals.device, dtype=torch.float64)  # of each diagonal
        return (self.diagonals * tiles).sum(-1) / tiles.sum()

    def column_counts(self) -> Tensor:
        """int64 `[B, H]`: columns of each head."""
        return (self.columns < self.length).sum(-1)


def slots_of(wanted: Tensor, positions: Tensor) -> Tensor:
    """int64: where each of `wanted` stands in `positions` `[N]`, which ascends; N for those that do not."""
    slot = torch.searchsorted(positions, wanted.to(positions.dtype))
    here = slot < len(positions)
    here &= positions[torch.where(here, slot, 0)] == wanted
    return torch.where(here, slot, len(positions))


def dense(index: Index, length: int) -> Tensor:
    """Bool `[B, H, length, length]`: what an index selects under a causal mask."""
    positions, whole = np.arange(length), slice(0, length)
    return index.at(Places.of(positions, positions, index.block, index.device)).visible(whole, whole).tril()


def _blocks(positions: np.ndarray, block: int) -> np.ndarray:
    """The block of each tile of `block` consecutive slots."""
    starts = np.arange(0, len(positions), block)
    first = positions[starts] // block
    within = positions - positions[starts].repeat(block)[: len(positions)]
    aligned = (positions[starts] % block == 0).all()
    if not aligned or (within != np.arange(len(positions)) % block).any():
        raise ValueError(
            f"a sparse index selects tiles of {block} tokens, but here tiles of slots are not blocks of so many "
            "consecutive tokens: set parallel.order to striped, leave parallel.stripe out or set it to a multiple of "
            f"{block}, and train.sequence_length to at least a stripe on each rank"
        )
    return first
