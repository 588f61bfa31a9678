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
from farspan.kernels.tiles import TileLists, TileMap
from farspan.kernels.triton.lists import lists_kernel

# Tiles that a program of the lists takes at once: of the side whose lists these are, and of the other side.
_OWN, _OTHER = 32, 64


@dataclass(frozen=True, eq=False)
class Columns:
    """The single keys of each head, and which of them a row tile may see: those from `first` to before `stop`.

    `slots` int32 `[B or 1, H, most]` ascends, the number of keys where a head has fewer; `first` and `stop` int32
    `[B or 1, H, row tiles]` count in it. `tiles` bool `[B or 1, H, row tiles, key tiles]`: where no column is computed.
    `spans` are those of the mask, see `TileMap`.
    """

    slots: Tensor
    first: Tensor
    stop: Tensor
    tiles: Tensor
    spans: tuple[Tensor, Tensor]
    keys: int

    @property
    def most(self) -> int:
        return self.slots.shape[2]

    def row_tiles(self, block: int) -> tuple[Tensor, Tensor]:
        """Of each group of `block` columns the first row tile that may see one, and one past the last.

        Both int32 `[B or 1, H, groups]`.
        """
        first_seen, last_seen = (x[:, None, None] for x in self.spans)
        lowest, highest = self.slots[..., ::block], self.slots[..., block - 1 :: block]
        highest = torch.cat([highest, self.slots[..., -1:]], -1)[..., : lowest.shape[2]]
        meets = (first_seen <= highest[..., None]) & (last_seen > lowest[..., None])
        tile = torch.arange(meets.shape[3], device=meets.device, dtype=torch.int32)
        first = torch.where(meets, tile, meets.shape[3]).amin(3)
        stop = torch.where(meets, tile + 1, 0).amax(3)
        return first.int().contiguous(), stop.int().contiguous()

    def places(self) -> Tensor:
        """int32 `[B or 1, H, keys + 1]`: one more than a key's place among the columns, 0 where it is none."""
        batch, heads, most = self.slots.shape
        places = self.slots.new_zeros(batch, heads, self.keys + 1)
        number = torch.arange(1, most + 1, dtype=torch.int32, device=places.device)
        places.scatter_(2, self.slots.long(), number.expand_as(self.slots))
        places[..., -1] = 0  # columns that a head does not have
        return places


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
    def by_row(self) -> TileLists:
        """For each query head and tile of rows its tiles of keys."""
        return self._lists(own_axis=2)

    @property
    def by_key(self) -> TileLists:
        """For each query head and tile of keys its tiles of rows; the order of the tiles is that of the kv head."""
        return self._lists(own_axis=3)

    @cached_property
    def columns(self) -> Columns | None:
        slots = self.selection.columns
        if slots is None or slots.shape[2] == 0:
            return None
        tiles = self._tiles
        slots = slots.expand(len(tiles), -1, -1).contiguous()
        seen = (x[:, None].expand(*tiles.shape[:3]).contiguous() for x in self.of_mask.spans)
        first, stop = (torch.searchsorted(slots, x, out_int32=True) for x in seen)
        return Columns(slots, first, torch.maximum(first, stop), tiles, self.of_mask.spans, self.of_mask.keys)

    @property
    def _tiles(self) -> Tensor:
        """The selected tiles for each mask or index of the batch, one after the other."""
        return self.selection.tiles.expand(max(len(self.selection.tiles), self.mask.batch), -1, -1, -1).contiguous()

    def _lists(self, own_axis: int) -> TileLists:
        tiles, kinds = self._tiles, self.of_mask.kinds
        batch, heads, own = tiles.shape[0], tiles.shape[1], tiles.shape[own_axis]

        def walk(starts: tuple[Tensor, Tensor], lists: tuple[Tensor, Tensor], write: bool) -> None:
            lists_kernel[(triton.cdiv(own, _OWN), heads, batch)](
                tiles.view(torch.uint8),
                kinds,
                *starts,
                *lists,
                own,
                tiles.shape[5 - own_axis],
                tiles.stride(own_axis),
                tiles.stride(5 - own_axis),
                tiles.stride(1),
                kinds.stride(0) if len(kinds) > 1 else 0,
                WRITE=write,
                OWN=_OWN,
                OTHER=_OTHER,
            )

        counts = (kinds.new_empty(batch, heads, own, dtype=torch.int32) for _ in range(2))
        full, partial = counts
        walk((full, partial), (full, partial), write=False)
        starts = _starts(full), _starts(partial)
        room = [count * heads * (batch // len(kinds)) for count in self.of_mask.kind_counts]
        full_tiles, partial_tiles = (kinds.new_empty(max(size, 1), dtype=torch.int32) for size in room)
        walk(starts, (full_tiles, partial_tiles), write=True)
        work = full + partial
        if own_axis == 3:
            work = work.unflatten(1, (self.kv_heads, -1)).sum(2)
        longest_first = work.argsort(dim=-1, descending=True, stable=True).int().contiguous()
        return TileLists(starts[0], full_tiles, starts[1], partial_tiles, longest_first, heads)


def _starts(counts: Tensor) -> Tensor:
    """Of lists that lie one after the other, where each begins; int64, for all heads together may pass 2^31."""
    return torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
