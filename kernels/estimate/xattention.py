"""XAttention's choice of tiles (arXiv:2503.16428): sums over antidiagonals stand for attention.

A row is cut into cells of `stride` tokens. The score of a cell of rows with a cell of keys is the sum of the scaled
products on the antidiagonal of their square, over `stride`; softmax over the cells of keys that are not behind gives
attention between cells, and its sum over a tile's cells the tile's mass. For each block of rows its own block and the
first block are computed, and besides the fewest others, by mass, that make up `threshold` of all.

In a row of several documents a cell is of the document of its last token, sees cells of that one alone, and its other
tokens are zeros, as behind the end of a row; "the first block" is the one where the document of the block's first row
begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.bits import WORD, packed
from farspan.kernels.estimate.documents import counted, document_starts
from farspan.kernels.estimate.fixed import fixed_sum, products
from farspan.kernels.estimate.select import ranked, shortest, strongest
from farspan.kernels.estimate.settings import XAttention
from farspan.kernels.masks import IntervalMask
from farspan.kernels.tiles import TILE
from farspan.kernels.transfer import to_device

_ROW_BLOCKS = 32  # whose scores exist at once, for the query heads of one kv head
_CELLS = 4096  # of keys in one product
_MASS_BITS = 30  # a cell of rows has a mass of 2 ** 30 to give


@dataclass(frozen=True, eq=False)
class CellSight:
    """What some blocks of rows see, in cells: int64 `[B or 1, blocks, cells of a block]`; `own` is -1 behind the row.

    A cell of rows sees the cells of keys from `first` to `own`, its own number. `home` int64 `[B or 1, blocks]`: the
    block in which the document of a block's first row begins. `counts` bool `[B or 1, blocks, TILE]`: queries that are
    not zeros. `numbers`: those of the blocks, on the host.
    """

    first: Tensor
    own: Tensor
    home: Tensor
    counts: Tensor
    numbers: np.ndarray

    @staticmethod
    def of(mask: IntervalMask, numbers: np.ndarray, stride: int, device: torch.device | str = "cpu") -> CellSight:
        starts, length = document_starts(mask), mask.rows
        cells = numbers[:, None] * (TILE // stride) + np.arange(TILE // stride)
        last = np.minimum((cells + 1) * stride, length) - 1
        first = starts[:, last] // stride
        own = np.broadcast_to(np.where(cells * stride < length, cells, -1), first.shape)
        home = starts[:, np.minimum(numbers * TILE, length - 1)] // TILE
        position = numbers[:, None] * TILE + np.arange(TILE)
        counts = counted(starts, stride)[:, np.minimum(position, length - 1)] & (position < length)

        def put(x: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(np.array(x)), device)

        return CellSight(put(first), put(own), put(home), put(counts), numbers)

    def part(self, some: slice, b: int, count: int) -> CellSight:
        """That of some of the blocks in one row of the batch, without its dim, and up to `count` that see nothing."""
        row, missing = (b if len(self.own) > 1 else 0), count - len(self.numbers[some])

        def take(x: Tensor, fill: int = 0) -> Tensor:
            return functional.pad(x[row, some], (0, 0) * (x.dim() - 2) + (0, missing), value=fill)

        parts = take(self.first), take(self.own, -1), take(self.home), take(self.counts)
        return CellSight(*parts, self.numbers[some])


def cells_count(mask: IntervalMask, stride: int) -> np.ndarray:
    """Bool `[B or 1, rows]`: which tokens' keys are not zeros in their cell."""
    return counted(document_starts(mask), stride)


@torch.no_grad()
def xattention(q: Tensor, k: Tensor, sight: CellSight, settings: XAttention, scale: float) -> Tensor:
    """int32 `[row blocks, B, H, words]`: the tiles that some blocks of rows compute, as `BlockIndex` has them.

    q `[row blocks, B, TILE, H, D]`; k `[blocks, B, TILE, Hkv, D]` of the whole row, with zeros where a token does not
    count. A block's choice has the same bits whichever blocks are beside it. Nothing here waits for a GPU.
    """
    blocks, batch, _, kv_heads, _ = k.shape
    group, stride, at_once = q.shape[3] // kv_heads, settings.stride, min(_ROW_BLOCKS, blocks)
    keys = _cells(k, stride).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, Hkv, cells, stride x D]
    cells = min(_CELLS, keys.shape[2])
    keys = functional.pad(keys, (0, 0, 0, -keys.shape[2] % cells)) if keys.shape[2] % cells else keys
    found = torch.empty(len(q), batch, kv_heads, group, -(-blocks // WORD), dtype=torch.int32, device=q.device)
    for first in range(0, len(q), at_once):
        some = slice(first, min(first + at_once, len(q)))
        last = min(int(sight.numbers[some].max()), blocks - 1)
        seen = -(-(last + 1) * (TILE // stride) // cells)
        for b in range(batch):
            part = sight.part(some, b, at_once)
            rows = functional.pad(q[some, b], (0, 0) * 3 + (0, first + at_once - some.stop))
            # Reversed as a whole, and its cells put back: each cell has its tokens in reverse.
            rows = torch.where(part.counts[..., None, None], rows, 0).flip(1)[:, None]
            rows = _cells(rows, stride)[:, 0].flip(2)
            rows = rows.unflatten(1, (kv_heads, group)).flatten(2, 3)  # [row blocks, Hkv, group x cells, stride x D]
            for head in range(kv_heads):
                slices = keys[b, head].split(cells)[:seen]
                scores = torch.cat([products(rows[:, head], of_keys) for of_keys in slices], -1)
                masses = _masses(scores.mul_(scale / stride), part)[..., :blocks]
                chosen = functional.pad(_choice(masses, part, settings.threshold), (0, blocks - masses.shape[-1]))
                found[some, b, head] = packed(chosen[: some.stop - first])
    return found.flatten(2, 3)


def _cells(x: Tensor, stride: int) -> Tensor:
    """`[blocks, B, TILE, heads, D]` as `[blocks, B, heads, cells of a block, stride x D]`."""
    return x.unflatten(2, (-1, stride)).permute(0, 1, 4, 2, 3, 5).flatten(4)


def _masses(scores: Tensor, part: CellSight) -> Tensor:
    """int64 `[row blocks, group, blocks]`: what each tile has of its rows' attention between cells.

    scores `[row blocks, group x cells of a block, cells]` are used up.
    """
    of_block = part.own.shape[1]
    scores = scores.unflatten(1, (-1, of_block))
    key = torch.arange(scores.shape[-1], device=scores.device)
    seen = (key >= part.first[..., None]) & (key <= part.own[..., None])
    scores.masked_fill_(~seen[:, None], float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(torch.where(highest == float("-inf"), 0.0, highest)).exp_()
    by_block = fixed_sum(weights.unflatten(-1, (-1, of_block)))
    total = fixed_sum(by_block)[..., None]
    shares = fixed_sum((by_block / torch.where(total > 0, total, 1.0)).movedim(2, -1))
    return shares.mul_(2.0**_MASS_BITS).add_(0.5).to(torch.int64)


def _choice(masses: Tensor, part: CellSight, threshold: float) -> Tensor:
    """Bool, as `masses`: a block's own tile and the first, and the fewest others that make up the threshold."""
    blocks = masses.shape[-1]
    block = torch.arange(blocks, device=masses.device)
    own = part.own[:, :1] // part.own.shape[1]
    always = ((block == own) | (block == part.home[:, None]))[:, None] & (own >= 0)[..., None]
    wanted = (masses.sum(-1).double() * threshold).ceil().long()
    needed = wanted - torch.where(always, masses, 0).sum(-1)
    places = shortest(strongest(ranked(torch.where(always, 0, masses), block), blocks), needed, blocks)
    chosen = masses.new_zeros(*masses.shape[:2], blocks + 1, dtype=torch.bool)
    return chosen.scatter_(2, places.long(), True)[..., :blocks] | always
