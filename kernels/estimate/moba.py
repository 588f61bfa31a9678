"""MoBA's choice of chunks (arXiv:2502.13189): each row attends to its own chunk and to those whose mean key it likes.

A row is cut into chunks. Each token computes its own chunk, as far as it sees it, and of the chunks before it the
`top_k - 1` that its query has the greatest products with, summed over a chunk's mean key. The gate is a choice and no
weight: training goes through the attention that is computed and not through the gate, as in the authors' code, where
gates become 0 or -inf before the softmax.

Chunks count from the row's beginning. In a row of several documents a chunk's mean is that of the tokens of its last
token's document, and a token has the gates of its own document's chunks alone: of all keys of a chunk before its own
that a token sees, and no others. Documents that begin with a chunk have the authors' gates of each by itself.
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
from farspan.kernels.estimate.settings import MoBA
from farspan.kernels.masks import IntervalMask
from farspan.kernels.tiles import TILE
from farspan.kernels.transfer import to_device

_ROW_BLOCKS = 32  # whose gates exist at once, for the query heads of one kv head
_KEY_BLOCKS = 256  # whose keys exist in fp32 at once
_HIDDEN = -(1 << 63)


@dataclass(frozen=True, eq=False)
class ChunkSight:
    """What the tokens of some blocks of rows may choose, int64 `[B or 1, blocks, TILE]`: chunks from `first` to before
    `own`, their own one, which is -1 behind the row. `counts` int64 `[B or 1, chunks]`: tokens of a chunk's mean.
    """

    first: Tensor
    own: Tensor
    counts: Tensor

    @staticmethod
    def of(mask: IntervalMask, numbers: np.ndarray, chunk: int, device: torch.device | str = "cpu") -> ChunkSight:
        """For the blocks with these numbers."""
        starts, length = document_starts(mask), mask.rows
        position = numbers[:, None] * TILE + np.arange(TILE)
        first = starts[:, np.minimum(position, length - 1)] // chunk
        own = np.broadcast_to(np.where(position < length, position // chunk, -1), first.shape)
        tokens = np.pad(counted(starts, chunk), ((0, 0), (0, -length % chunk)))
        counts = tokens.reshape(len(starts), -1, chunk).sum(-1)

        def put(x: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(np.array(x)), device)

        return ChunkSight(put(first), put(own), put(counts))


def chunks_count(mask: IntervalMask, chunk: int) -> np.ndarray:
    """Bool `[B or 1, rows]`: which tokens' keys are in their chunk's mean."""
    return counted(document_starts(mask), chunk)


def block_sums(k: Tensor) -> Tensor:
    """fp32 `[blocks, B, Hkv, D]` of k `[blocks, B, TILE, Hkv, D]`, which has zeros where a token does not count."""
    return torch.cat([fixed_sum(some.float().movedim(2, -1)) for some in k.split(_KEY_BLOCKS)])


@torch.no_grad()
def moba(q: Tensor, sums: Tensor, sight: ChunkSight, settings: MoBA) -> Tensor:
    """int32 `[row blocks, B, H, words, TILE]`: the chunks that each token of some blocks computes, as `ChunkIndex` has
    them.

    q `[row blocks, B, TILE, H, D]`; `sums` are those of all blocks of the row. Of equal gates the earlier chunk is
    chosen. A block's choice has the same bits whichever blocks are beside it. Nothing here waits for a GPU.
    """
    batch, kv_heads, blocks = q.shape[1], sums.shape[2], settings.chunk // TILE
    sums = functional.pad(sums, (0, 0) * 3 + (0, -len(sums) % blocks)).unflatten(0, (-1, blocks))
    counts = sight.counts.T[..., None, None]
    means = (fixed_sum(sums.movedim(1, -1)) / counts.clamp(min=1)).permute(1, 2, 0, 3)  # [B, Hkv, chunks, D]
    at_once = min(_ROW_BLOCKS, len(sums) * blocks)
    group = q.shape[3] // kv_heads
    words = -(-means.shape[2] // WORD)
    found = torch.empty(len(q), batch, kv_heads, group, words, TILE, dtype=torch.int32, device=q.device)
    for first in range(0, len(q), at_once):
        some = slice(first, min(first + at_once, len(q)))
        for b in range(batch):
            rows = functional.pad(q[some, b], (0, 0) * 3 + (0, first + at_once - some.stop))
            rows = rows.transpose(1, 2).unflatten(1, (kv_heads, group)).flatten(2, 3)
            chunks = _chunks(sight, some, b, means.shape[2])
            for head in range(kv_heads):
                gates = products(rows[:, head], means[b, head])[: some.stop - first]
                chosen = _choice(gates.unflatten(1, (group, TILE)), *chunks, settings.top_k - 1)
                found[some, b, head] = packed(chosen).transpose(-1, -2)
    return found.flatten(2, 3)


def _chunks(sight: ChunkSight, some: slice, b: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Bool `[row blocks, 1, TILE, chunks]`: a token's own chunk, and those before it that it may choose."""
    row = b if len(sight.own) > 1 else 0
    first, own = (x[row, some][:, None, :, None] for x in (sight.first, sight.own))
    chunk = torch.arange(chunks, device=own.device)
    return chunk == own, (chunk >= first) & (chunk < own)


def _choice(gates: Tensor, own: Tensor, before: Tensor, most: int) -> Tensor:
    """Bool, as gates fp32 `[row blocks, group, TILE, chunks]`: the own chunk, and the `most` greatest before."""
    chunks = gates.shape[-1]
    if min(most, chunks) == 0:
        return own.expand_as(gates)
    # As integers, in the same order, and with the chunk's number behind: no two equal, the earlier the greater.
    bits = (gates + 0.0).view(torch.int32)  # which makes 0 of -0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * chunks
    ranks = ordered + torch.arange(chunks - 1, -1, -1, device=gates.device)
    ranks = torch.where(before, ranks, _HIDDEN)
    least = ranks.topk(min(most, chunks), dim=-1).values[..., -1:]
    return own | (before & (ranks >= least))
