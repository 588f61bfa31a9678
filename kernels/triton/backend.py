"""The Triton backend: every interval mask, by kernels for Hopper where they take the tensors, or by portable ones."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from farspan.kernels.backends.base import BackwardCall, ForwardCall
from farspan.kernels.index import Selection
from farspan.kernels.problem import Problem
from farspan.kernels.tiles import TILE, TileMap
from farspan.kernels.triton.hopper import launch as hopper
from farspan.kernels.triton.portable import launch as portable
from farspan.kernels.triton.selected import SelectedTiles, Tiles
from farspan.kernels.triton.tensors import last_contiguous, new_or

any_mask = True
deterministic = True
plans_shapes = False

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def refusal(problem: Problem) -> str | None:
    if problem.capability is None and not _INTERPRETED:
        return "triton needs a GPU"
    if problem.dtype not in _DTYPES:
        return f"triton takes bf16, fp16 and fp32, got {problem.dtype}"
    if _INTERPRETED and problem.dtype == torch.bfloat16:
        return "triton computes bf16 wrongly where TRITON_INTERPRET is set"
    if problem.index_block not in (None, TILE):
        return f"triton takes a sparse index of {TILE}-token tiles, got one of {problem.index_block}"
    dims = problem.head_dim, problem.value_dim
    if max(dims) > 256 or any(dim * problem.dtype.itemsize % 16 for dim in dims):
        return f"triton takes head dims up to 256 whose rows are multiples of 16 bytes, got {dims[0]} and {dims[1]}"
    return None


def attend(call: ForwardCall) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    if call.accumulate is None:
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=call.out_dtype)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    else:
        out, lse = call.accumulate
    accumulates = call.accumulate is not None
    tiles = _tiles(call)
    if not _by_hopper(call):
        portable.forward(q, k, v, tiles, call.scale, out, lse, accumulates)
        return out, lse
    base = (out, lse) if accumulates else None
    if _has_columns(call.index):
        base = base or (_in_fp32(out), _in_fp32(lse))
        portable.forward(q, k, v, tiles, call.scale, *base, accumulates, columns_alone=True)
    hopper.forward(q, k, v, tiles, call.scale, out, lse, base)
    return out, lse


def attend_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, totals = call.q, call.k, call.v, call.accumulate
    dq, dk, dv = (new_or(x, call.out_dtype, total) for x, total in zip((q, k, v), totals, strict=True))
    adds = (totals[0] is not None, totals[1] is not None, totals[2] is not None)
    lse, delta = last_contiguous(call.lse), last_contiguous(call.delta)
    given = (call.dout, q, k, v, lse, delta, _tiles(call), call.scale)
    if not _by_hopper(call):
        portable.backward(*given, (dq, dk, dv), adds)
        return dq, dk, dv
    bases = totals
    if _has_columns(call.index):
        of_columns = tuple(_in_fp32(x) if total is None else total for x, total in zip((dq, dk, dv), totals))
        bases = (of_columns[0], of_columns[1], of_columns[2])
        portable.backward(*given, bases, adds, columns_alone=True)
    hopper.backward(*given, (dq, dk, dv), bases)
    return dq, dk, dv


def _by_hopper(call: ForwardCall | BackwardCall) -> bool:
    """Its kernels take an index's tiles as they are, whichever row computes them."""
    return hopper.takes(call.q, call.v) and (call.index is None or call.index.chunks is None)


def _has_columns(index: Selection | None) -> bool:
    """Hopper's kernels compute tiles; single columns come before, and they add."""
    return index is not None and index.columns is not None and index.columns.shape[2] > 0


def _in_fp32(x: Tensor) -> Tensor:
    """A place for what is computed before, so that it is rounded but once, at the end."""
    return torch.empty_like(x, dtype=torch.float32)


def _tiles(call: ForwardCall | BackwardCall) -> Tiles:
    of_mask = TileMap.of(call.mask, call.k.shape[1])
    return of_mask if call.index is None else SelectedTiles(of_mask, call.index, call.k.shape[2])
