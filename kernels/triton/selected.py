"""What a kernel visits under a sparse index: lists of tiles by head, and columns.

The host asks the device for nothing, so a list has room for all tiles that the mask shows, of every head; what is
written, and read, are the tiles that are selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from farspan.kernels.index import Selection
from farspan.kernels.masks import IntervalMask
from farspan.kernels.tiles import TILE, Kind, TileLists, TileMap
from farspan.kernels.triton.lists import columns_kernel, groups_kernel, ranges_kernel, tiles_kernel

# Tiles that a program of the lists takes at once: of the side whose lists these are, and of the other side. A list by
# key is of all heads of a group, one after the other, so that fewer of them are at work.
_OWN, _OWN_OF_GROUP, _OTHER = 32, 8, 64
# Columns, and row tiles, that a program takes at once.
_COLUMNS, _ROW_TILES = 1024, 128


@dataclass(frozen=True, eq=False)
class Columns:
    """The single keys of each head: where they are not in a selected tile, every row computes those that it sees.

    `slots` int32 `[B or 1, H, most]` ascends, the number of keys where a head has fewer; `at` are the `key_at` of their
    tiles; `places` `[B or 1, H, keys + 1]` one more than a key's number among them, 0 where it is none. `selection`
    says which tiles are selected, of rows that see `spans` of the mask, see `TileMap`.
    """

    slots: Tensor
    at: Tensor
    places: Tensor
    of_mask: TileMap
    selection: Selection
    batch: int

    @property
    def most(self) -> int:
        return self.slots.shape[2]

    @cached_property
    def of_row_tiles(self) -> tuple[Tensor, Tensor]:
        """The columns that a row tile may see: from a first one to before a last. Both int32 `[B, H, row tiles]`."""
        row_tiles = self.of_mask.spans[0].shape[1]
        first, stop = (self.slots.new_empty(self.batch, self.slots.shape[1], row_tiles) for _ in range(2))
        grid = (triton.cdiv(row_tiles, _ROW_TILES), self.slots.shape[1], self.batch)
        ranges_kernel[grid](self.slots, *self.of_mask.spans, first, stop, *self._sizes, BLOCK=_ROW_TILES)
        return first, stop

    def of_groups(self, size: int) -> tuple[Tensor, Tensor]:
        """Of each group of `size` columns the first row tile that may see one, and one past the last.

        Both int32 `[B, H, groups]`.
        """
        groups = triton.cdiv(self.most, size)
        first, stop = (self.slots.new_empty(self.batch, self.slots.shape[1], groups) for _ in range(2))
        grid = (groups, self.slots.shape[1], self.batch)
        groups_kernel[grid](
            self.slots, *self.of_mask.spans, first, stop, *self._sizes, GROUP=size, BLOCK=8 * _ROW_TILES
        )
        return first, stop

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Columns, row tiles, and steps over the batch of slots and of spans."""
        heads, row_tiles = self.slots.shape[1], self.of_mask.spans[0].shape[1]
        of_mask = row_tiles if self.of_mask.mask.batch > 1 else 0
        return self.most, row_tiles, heads if len(self.slots) > 1 else 0, of_mask


@dataclass(frozen=True, eq=False)
class SelectedTiles:
    """A mask's tiles under a selection, as a `TileMap` for kernels: the lists are made when they are asked for."""

    of_mask: TileMap
    selection: Selection
    kv_heads: int
    offset: None = None

    @property
    def mask(self) -> IntervalMask:
        return self.of_mask.mask

    @property
    def batch(self) -> int:
        return max(self.selection.shape[0], self.mask.batch)

    @property
    def by_row(self) -> TileLists:
        """For each query head and tile of rows its tiles of keys."""
        return self._lists(self.selection.shape[1], self.selection.row_at, self.selection.key_at, (1, 2))

    @property
    def by_key(self) -> TileLists:
        """For each kv head and tile of keys the tiles of rows of its query heads: `member x row tiles + row tile`."""
        return self._lists(self.kv_heads, self.selection.key_at, self.selection.row_at, (2, 1))

    @cached_property
    def columns(self) -> Columns | None:
        wanted, positions = self.selection.columns, self.selection.k_positions
        if wanted is None or wanted.shape[2] == 0:
            return None
        (batch, heads, most), keys = wanted.shape, len(positions)
        slots, at = torch.empty_like(wanted), torch.empty_like(wanted)
        places = wanted.new_zeros(batch, heads, keys + 1)
        # fmt: off
        columns_kernel[(heads, batch)](
            wanted, positions, self.selection.key_at, slots, at, places, keys, most,
            TILE=TILE, CHUNK=min(_COLUMNS, triton.next_power_of_2(most)),
        )
        # fmt: on
        return Columns(slots, at, places, self.of_mask, self.selection, self.batch)

    def _lists(self, lines: int, own_at: Tensor, other_at: Tensor, axes: tuple[int, int]) -> TileLists:
        table, kinds = self.selection.table, self.of_mask.kinds
        if self.selection.chunks is not None:  # each element is tested for its row's
            kinds = kinds.clamp(max=Kind.PARTIAL)
        own, other, batch = len(own_at), len(other_at), self.batch
        lists, group = batch * lines * own, table.shape[1] // lines
        at_once = _OWN if group == 1 else _OWN_OF_GROUP
        counts = kinds.new_empty(1 + 2 * lists, dtype=torch.int64)

        def walk(starts: Tensor, tiles: Tensor, write: bool) -> None:
            tiles_kernel[(triton.cdiv(own, at_once), lines, batch)](
                table.view(torch.uint8),
                table.stride(0) if len(table) > 1 else 0,
                table.stride(1),
                table.shape[2],
                own_at,
                other_at,
                kinds,
                starts,
                counts,
                tiles,
                own,
                other,
                kinds.stride(axes[0]),
                kinds.stride(axes[1]),
                kinds.stride(0) if len(kinds) > 1 else 0,
                GROUP=group,
                WRITE=write,
                OWN=at_once,
                OTHER=_OTHER,
            )

        walk(counts, own_at, write=False)
        starts = counts.cumsum(0)
        room = sum(self.of_mask.kind_counts) * table.shape[1] * (batch // len(kinds))
        tiles = own_at.new_empty(max(room, 1))
        walk(starts, tiles, write=True)
        order = self.of_mask.row_order if axes == (1, 2) else self.of_mask.key_order
        return TileLists(starts[: lists + 1], tiles, starts[lists:], tiles, order, lines)


Tiles = TileMap | SelectedTiles
