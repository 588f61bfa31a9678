"""The passes over the probes' scores in plain torch, for a CPU; `kernels.triton.estimate` has them for a GPU.

Whatever the number of devices that share the keys, a pair's score has the same bits: each tile of 128 keys is a
product of one and the same shape, of the same numbers. All that is summed over pairs is an integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.estimate.probes import Probes
from farspan.kernels.estimate.select import ranked
from farspan.kernels.estimate.settings import VerticalSlash
from farspan.kernels.estimate.units import NOTHING, QUARTERS, STANDS_OUT, WEIGHT_BITS
from farspan.kernels.tiles import TILE


def row_weights(q: Tensor, k: Tensor, probes: Probes, scale: float) -> tuple[Tensor, Tensor]:
    """Of each probe in each tile of keys: the exponent of 2 above its highest score, and its weights' sum below it.

    q `[B, H, probes, D]`, k `[B, N, Hkv, D]`. Both int32 `[B, H, key tiles, probes]`; a sum counts `2 ** -WEIGHT_BITS`
    of the exponent's power, which is NOTHING where a probe sees no key of the tile.
    """
    shape = (q.shape[0], q.shape[1], len(probes.k_blocks), probes.rows)
    exponents = q.new_full(shape, NOTHING, dtype=torch.int32)
    sums = torch.zeros_like(exponents)
    for tile in _tiles(q, k, probes, scale):
        highest = tile.scores.amax(-1)
        seen = highest > float("-inf")
        exponent = torch.where(seen, highest.ceil(), 0.0)
        weights = (tile.scores - exponent[..., None]).exp2_().mul_(2.0**WEIGHT_BITS).add_(0.5).to(torch.int32)
        exponents[:, :, tile.number, tile.rows] = torch.where(seen, exponent.to(torch.int32), NOTHING)
        sums[:, :, tile.number, tile.rows] = weights.sum(-1, dtype=torch.int32)
    return exponents, sums


def column_scores(
    q: Tensor, k: Tensor, probes: Probes, scale: float, lse: Tensor, bits: int, settings: VerticalSlash
) -> tuple[Tensor, Tensor]:
    """What each key gets from all probes as a column; and what is always computed, in all, and in columns.

    A set's quarters of rows all have to attend to a column, for else it is crossed by diagonals: it counts as four
    times what the quarter that attends least gives. And it has to get STANDS_OUT times its even share of its tile, for
    else the tile is the cheaper choice. lse `[B, H, probes]` is to base 2; masses count `2 ** -bits` of a row.

    Returns int64 `[B, H, N]`, `ranked` by position, and the three sums int64 `[B, H, 3]`.
    """
    scores = q.new_zeros(*q.shape[:2], len(probes.k_blocks) * TILE, dtype=torch.int64)
    sums = q.new_zeros(*q.shape[:2], 2, dtype=torch.int64)
    for tile in _tiles(q, k, probes, scale):
        masses = _masses(tile, lse, bits)
        open_ = torch.where(_always(tile, probes, settings), 0, masses)
        of_tile, in_all = open_.sum((2, 3)), masses.sum((2, 3))
        sums += torch.stack([in_all - of_tile, in_all], -1)
        least = open_.unflatten(2, (QUARTERS, -1)).sum(3).amin(2) * QUARTERS
        stands_out = least * TILE >= of_tile[..., None] * STANDS_OUT
        scores[:, :, tile.number * TILE : (tile.number + 1) * TILE] += torch.where(stands_out, least, 0)
    positions = (probes.k_blocks.long()[:, None] * TILE + torch.arange(TILE, device=scores.device)).flatten()
    sums = torch.cat([sums, scores.sum(-1, keepdim=True)], -1)
    return ranked(scores, positions)[..., : probes.keys], sums


def diagonal_masses(
    q: Tensor, k: Tensor, probes: Probes, scale: float, lse: Tensor, bits: int, settings: VerticalSlash, chosen: Tensor
) -> Tensor:
    """What is left in each tile, neither always computed nor in a chosen column, by the set's two blocks of rows.

    chosen bool `[B, H, N]`. Returns int64 `[B, H, sets, 2, key tiles]`; other arguments as in `column_scores`.
    """
    left = q.new_zeros(*q.shape[:2], probes.sets, 2, len(probes.k_blocks), dtype=torch.int64)
    chosen = functional.pad(chosen, (0, -probes.keys % TILE))
    for tile in _tiles(q, k, probes, scale):
        taken = _always(tile, probes, settings) | chosen[:, :, None, tile.number * TILE : (tile.number + 1) * TILE]
        of_rows = torch.where(taken, 0, _masses(tile, lse, bits)).sum(-1)
        second = probes.blocks[:, None, tile.rows] > probes.first_block[:, None, tile.set, None]
        for which, rows in enumerate((~second, second)):
            left[:, :, tile.set, which, tile.number] = torch.where(rows, of_rows, 0).sum(-1)
    return left


class _Tile(NamedTuple):
    """One tile of keys beside one set of probes; scores `[B, H, rows, TILE]` to base 2, -inf where nothing is seen."""

    number: int
    set: int
    rows: slice
    scores: Tensor


def _tiles(q: Tensor, k: Tensor, probes: Probes, scale: float) -> Iterator[_Tile]:
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[2]
    queries = q.float().reshape(batch * kv_heads, heads // kv_heads, probes.sets, probes.size, dim)
    for number in range(len(probes.k_blocks)):
        slots = slice(number * TILE, min((number + 1) * TILE, probes.keys))
        keys = k[:, slots].float().transpose(1, 2).reshape(batch * kv_heads, -1, dim)
        keys = functional.pad(keys, (0, 0, 0, TILE - keys.shape[1])).contiguous()
        for set_ in range(probes.sets):
            rows = slice(set_ * probes.size, (set_ + 1) * probes.size)
            seen = probes.visible.visible(rows, slice(number * TILE, (number + 1) * TILE))
            if not seen.any():
                continue
            products = torch.bmm(queries[:, :, set_].flatten(1, 2).contiguous(), keys.transpose(1, 2))
            scores = products.view(batch, heads, probes.size, TILE).mul_(scale * math.log2(math.e))
            yield _Tile(number, set_, rows, scores.masked_fill_(~seen[:, None], float("-inf")))


def _masses(tile: _Tile, lse: Tensor, bits: int) -> Tensor:
    return (tile.scores - lse[:, :, tile.rows, None]).exp2_().mul_(2.0**bits).add_(0.5).to(torch.int64)


def _always(tile: _Tile, probes: Probes, settings: VerticalSlash) -> Tensor:
    """Bool `[B or 1, 1, rows, TILE]`: pairs in diagonals and columns that are always computed."""
    block = probes.k_blocks[tile.number]
    near = probes.blocks[:, None, tile.rows, None] - block < settings.local_blocks
    return near | (block * TILE + torch.arange(TILE, device=block.device) < settings.sinks)
