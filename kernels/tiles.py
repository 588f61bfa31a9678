"""Which 128 x 128 tiles of the attention matrix a mask lets a kernel visit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.masks import IntervalMask

TILE = 128


class Kind(IntEnum):
    """How much of a tile a mask shows."""

    NOTHING = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True, eq=False)
class TileLists:
    """For each tile of one side, the tiles of the other side that it meets, in ascending order.

    Tile t of list row b meets `full_tiles[full_start[b * n + t] : full_start[b * n + t + 1]]`, where every element is
    visible, and likewise `partial_tiles`, where elements must be tested. All are int32. A list row is a row of the
    mask's batch; with `heads`, where each head has lists of its own, it is `b * heads + h`, and starts are int64.
    `longest_first` `[mask batch, n]` is an order in which to start the tiles, so that those that finish last are short.
    """

    full_start: Tensor
    full_tiles: Tensor
    partial_start: Tensor
    partial_tiles: Tensor
    longest_first: Tensor
    heads: int = 0

    @property
    def strides(self) -> tuple[int, int]:
        """List rows from one batch element to the next, and from one head to the next; 0 where they share."""
        rows, of_one = (len(self.full_start) - 1) // self.longest_first.shape[1], max(self.heads, 1)
        return (of_one if rows > of_one else 0), int(self.heads > 0)


@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles of one mask over `keys` keys; built on the mask's device, once a mask.

    `offset` is set for a mask that needs no list: row q sees the keys `[0, min(q + 1 + offset, keys))`, which is causal
    (aligned bottom-right with offset = keys - rows) or, with offset = keys, full. Otherwise the tiles are in the lists.
    """

    mask: IntervalMask
    keys: int
    offset: int | None

    @staticmethod
    def of(mask: IntervalMask, keys: int) -> TileMap:
        """The tile map of a mask, built at the first call. ValueError if the mask lets a row see keys past `keys`."""
        name = f"tiles of {keys}"
        if name not in mask.derived:
            if int(torch.maximum(mask.end.max(), mask.anchor_end.max())) > keys:
                raise ValueError(f"a mask that sees keys up to {int(mask.end.max())} was given {keys} keys")
            mask.derived[name] = TileMap(mask, keys, _offset(mask, keys))
        tile_map: TileMap = mask.derived[name]
        return tile_map

    @cached_property
    def by_row(self) -> TileLists:
        """For each tile of rows its tiles of keys."""
        return _lists(*self._active)

    @cached_property
    def by_key(self) -> TileLists:
        """For each tile of keys its tiles of rows."""
        return _lists(*(kind.transpose(1, 2) for kind in self._active))

    @cached_property
    def row_order(self) -> Tensor:
        """The row tiles with most visible keys first, int32 `[B, row tiles]`."""
        if self.offset is None:
            return self.by_row.longest_first
        return torch.arange(-(-self.mask.rows // TILE) - 1, -1, -1, dtype=torch.int32, device=self.mask.device)[None]

    @cached_property
    def key_order(self) -> Tensor:
        """The key tiles that most rows see first, int32 `[B, key tiles]`."""
        if self.offset is None:
            return self.by_key.longest_first
        return torch.arange(-(-self.keys // TILE), dtype=torch.int32, device=self.mask.device)[None]

    @cached_property
    def kinds(self) -> Tensor:
        """The `Kind` of each tile, int8 `[B, row tiles, key tiles]`: 16 MiB at half a million tokens."""
        full, partial = self._active
        return full.to(torch.int8) * Kind.FULL + partial.to(torch.int8) * Kind.PARTIAL

    @cached_property
    def kind_counts(self) -> tuple[int, int]:
        """Full and partial tiles, summed over the mask's batch, known to the host."""
        return int((self.kinds == Kind.FULL).sum()), int((self.kinds == Kind.PARTIAL).sum())

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """The first key that any row of a row tile sees, and one past the last, int32 `[B, row tiles]`.

        Of a tile that sees nothing the first is the number of keys, and the last 0.
        """
        begin, end, anchor_begin, anchor_end = self.mask.bounds
        blind = (end <= begin) & (anchor_end <= anchor_begin)
        first = torch.where(blind, self.keys, torch.minimum(begin, anchor_begin))
        last = torch.where(blind, 0, torch.maximum(end, anchor_end))
        padding = (0, -self.mask.rows % TILE)
        first, last = (
            torch.nn.functional.pad(x, padding, value=fill).unflatten(1, (-1, TILE))
            for x, fill in ((first, self.keys), (last, 0))
        )
        return first.amin(2).int(), last.amax(2).int()

    @cached_property
    def pairs(self) -> int:
        """Visible (row, key) pairs, summed over the mask's batch."""
        return self.mask.area()

    @cached_property
    def active_tiles(self) -> int:
        """Tiles in which something is visible, summed over the mask's batch."""
        return sum(int(kind.sum()) for kind in self._active)

    def flops(self, heads: int, head_dim: int, batch: int = 1) -> int:
        """Floating-point operations of one forward pass, counted for visible pairs alone; backward has 2.5 times."""
        return 4 * heads * head_dim * self.pairs * (batch // self.mask.batch)

    @property
    def _active(self) -> tuple[Tensor, Tensor]:
        """Full and partial tiles, bool `[B, row tiles, key tiles]`; not kept, for it is large at a million tokens."""
        row_tiles, key_tiles = -(-self.mask.rows // TILE), -(-self.keys // TILE)
        row = torch.arange(self.mask.rows, device=self.mask.device)
        cell = torch.arange(self.mask.batch, device=row.device)[:, None] * row_tiles + row // TILE

        def count(first: Tensor, stop: Tensor, at: Tensor) -> None:
            """Adds one for each row to the tiles from first to stop, as a step up and a step down."""
            step = (stop > first).int().flatten()
            at.index_add_(0, (cell * (key_tiles + 1) + first).flatten(), step)
            at.index_add_(0, (cell * (key_tiles + 1) + stop.maximum(first)).flatten(), -step)

        touched = row.new_zeros(self.mask.batch * row_tiles * (key_tiles + 1), dtype=torch.int32)
        covered = torch.zeros_like(touched)
        begin, end, anchor_begin, anchor_end = self.mask.bounds
        for first, stop in ((begin, end), (anchor_begin, anchor_end)):
            seen = stop > first
            count(first // TILE, torch.where(seen, -(-stop // TILE), first // TILE), touched)
            count(-(-first // TILE), stop // TILE, covered)
        shape = (self.mask.batch, row_tiles, key_tiles + 1)
        touches, covers = (x.view(shape).cumsum(-1, dtype=torch.int32)[..., :-1] for x in (touched, covered))
        full = covers == torch.bincount(row // TILE, minlength=row_tiles)[:, None]
        return full, (touches > 0) & ~full


def _offset(mask: IntervalMask, keys: int) -> int | None:
    if bool(((mask.anchor_end > mask.anchor_begin) | (mask.begin > 0)).any()):
        return None
    row = torch.arange(mask.rows, device=mask.device)
    first, last = int(mask.end[0, 0]), int(mask.end[0, -1])
    for offset in (keys if first == keys else first - 1, last - mask.rows):
        if bool((mask.end == (row + 1 + offset).clamp(0, keys)).all()):
            return offset
    return None


def _lists(full: Tensor, partial: Tensor) -> TileLists:
    work = full.sum(-1) + partial.sum(-1)
    longest_first = work.argsort(dim=-1, descending=True, stable=True).int()
    return TileLists(*_compressed(full), *_compressed(partial), longest_first.contiguous())


def _compressed(active: Tensor) -> tuple[Tensor, Tensor]:
    """Start of each list (one more than there are lists), and the lists one after the other."""
    counts = active.sum(-1, dtype=torch.int32).flatten()
    start = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    tiles = active.flatten().nonzero().squeeze(1) % active.shape[-1]
    return start, tiles.int()
