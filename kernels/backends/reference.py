"""The reference backend: plain torch in row blocks, for any device, dtype and mask.

It is the CPU path and what other backends are compared with. A block of rows meets only the keys between the lowest
and the highest bound of its rows, so causal work is halved and windows stay linear.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from farspan.kernels.backends.base import BackwardCall, ForwardCall
from farspan.kernels.masks import IntervalMask
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.problem import Problem

any_mask = True
deterministic = True
plans_shapes = False

# Scores held at once, over batch, heads, rows and keys: 64 MiB in fp32.
_SCORES = 1 << 24
# Rows of a block: on a CPU its scores then stay in the cache, on a GPU they fill the chip.
_ROWS = {"cpu": 64, "cuda": 512}


def refusal(problem: Problem) -> str | None:
    return None


def attend(call: ForwardCall) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    work = accumulation_dtype(q.dtype)
    batch, rows, heads, _ = q.shape
    queries, keys, values = _grouped(q, k.shape[2]), _by_head(k), _by_head(v)
    out = q.new_zeros(batch, rows, heads, v.shape[3], dtype=work)
    lse = q.new_full((batch, heads, rows), float("-inf"), dtype=work)
    for tile in _tiles(call.mask, q, k):
        weights = _scores(queries, keys, call, tile)
        highest = _finite(weights.amax(-1))
        weights.sub_(highest[..., None]).exp_()
        total = weights.sum(-1)
        part = (weights.flatten(2, 3) @ values[:, :, tile.keys].to(work)).unflatten(2, weights.shape[2:4])
        # A row that sees nothing has weights and total 0.
        part.div_(torch.where(total == 0, torch.ones_like(total), total)[..., None])
        out[:, tile.rows] = _ungrouped(part)
        lse[:, :, tile.rows] = (highest + total.log()).flatten(1, 2)
    return call.deliver(out, lse)


def attend_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, scale = call.q, call.k, call.v, call.scale
    work = accumulation_dtype(q.dtype)
    kv_heads = k.shape[2]
    queries, keys, values, gradients = _grouped(q, kv_heads), _by_head(k), _by_head(v), _grouped(call.dout, kv_heads)
    row_lse = call.lse.unflatten(1, (kv_heads, -1))
    row_delta = call.delta.unflatten(1, (kv_heads, -1))
    dq = torch.zeros_like(q, dtype=work)
    dk = torch.zeros_like(keys, dtype=work, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(values, dtype=work, memory_format=torch.contiguous_format)
    for tile in _tiles(call.mask, q, k):
        weights = _scores(queries, keys, call, tile)
        shape = weights.shape[2:4]
        weights.sub_(_finite(row_lse[..., tile.rows])[..., None]).exp_()
        weights = weights.flatten(2, 3)
        rows = queries[:, :, :, tile.rows].to(work).flatten(2, 3)
        dout_rows = gradients[:, :, :, tile.rows].to(work).flatten(2, 3)
        dv[:, :, tile.keys] += weights.transpose(-1, -2) @ dout_rows
        ds = dout_rows @ values[:, :, tile.keys].to(work).transpose(-1, -2)
        ds.sub_(row_delta[..., tile.rows].flatten(2, 3)[..., None]).mul_(weights)
        dq[:, tile.rows] = _ungrouped((ds @ keys[:, :, tile.keys].to(work)).unflatten(2, shape)) * scale
        dk[:, :, tile.keys] += ds.transpose(-1, -2) @ (rows * scale)
    return call.deliver((dq, dk.transpose(1, 2), dv.transpose(1, 2)))


class _Tile:
    """A block of rows, the span of keys that they can see, and whether every element of it is visible."""

    def __init__(self, rows: slice, keys: slice, whole: bool) -> None:
        self.rows, self.keys, self.whole = rows, keys, whole


def _tiles(mask: IntervalMask, q: Tensor, k: Tensor) -> Iterator[_Tile]:
    batch, length, heads, _ = q.shape
    rows = max(1, min(_ROWS.get(q.device.type, 512), _SCORES // max(1, batch * heads * k.shape[1])))
    starts = range(0, length, rows)
    # One reduction over the whole mask, so that a GPU is asked once and not once a block.
    first, last, shortest = (bound.tolist() for bound in _block_bounds(mask, rows))
    for start, low, high, narrow in zip(starts, first, last, shortest):
        if high > low:
            yield _Tile(slice(start, min(start + rows, length)), slice(low, high), narrow == high - low)


def _block_bounds(mask: IntervalMask, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each block of rows: lowest begin, highest end, and the fewest keys that one of its rows sees."""
    big = torch.iinfo(torch.int32).max

    def reduce(bound: Tensor, fill: int, largest: bool) -> Tensor:
        padded = torch.nn.functional.pad(bound, (0, -bound.shape[1] % rows), value=fill).unflatten(1, (-1, rows))
        return padded.amax((0, 2)) if largest else padded.amin((0, 2))

    seen = (mask.end - mask.begin) + (mask.anchor_end - mask.anchor_begin)
    low = torch.where(seen == 0, torch.full_like(seen, big), torch.minimum(mask.begin, mask.anchor_begin))
    high = torch.where(seen == 0, torch.zeros_like(seen), torch.maximum(mask.end, mask.anchor_end))
    return reduce(low, big, False), reduce(high, 0, True), reduce(seen, big, False)


def _scores(queries: Tensor, keys: Tensor, call: ForwardCall | BackwardCall, tile: _Tile) -> Tensor:
    """Scaled scores `[B, Hkv, group, rows, keys]`, -inf where the mask hides or the index leaves out."""
    work = accumulation_dtype(queries.dtype)
    rows = queries[:, :, :, tile.rows].to(work) * call.scale
    scores = (rows.flatten(2, 3) @ keys[:, :, tile.keys].to(work).transpose(-1, -2)).unflatten(2, rows.shape[2:4])
    if not tile.whole:
        scores.masked_fill_(~call.mask.visible(tile.rows, tile.keys)[:, None, None], float("-inf"))
    if call.index is not None:
        selected = call.index.visible(tile.rows, tile.keys).unflatten(1, scores.shape[1:3])
        scores.masked_fill_(~selected, float("-inf"))
    return scores


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, H, D]` as `[B, Hkv, H // Hkv, S, D]`, a view: query heads beside the kv head that they read."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _finite(lse: Tensor) -> Tensor:
    """Rows that see nothing have lse -inf; with 0 instead, exp(-inf - 0) is the 0 that they need."""
    return torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
