"""Two passes over rows of attention's output: delta for the backward pass, and merging of partial results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.triton.tensors import last_contiguous, strided

_BLOCK = 64


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """`rowsum(dout * out)` fp32 `[B, H, S]` of `[B, S, H, D]`, each read once."""
    batch, rows, heads, dim = out.shape
    delta = out.new_empty(batch, heads, rows, dtype=torch.float32)
    dout, out = last_contiguous(dout), last_contiguous(out)
    _delta_kernel[(triton.cdiv(rows, _BLOCK), heads, batch)](
        *strided(dout, (0, 1, 2)),
        *strided(out, (0, 1, 2)),
        delta,
        rows,
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        BLOCK=_BLOCK,
    )
    return delta


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges a part computed over other keys into out `[B, S, H, D]` and lse `[B, H, S]`, both fp32, in one pass."""
    batch, rows, heads, dim = out.shape
    _merge_kernel[(triton.cdiv(rows, _BLOCK), heads, batch)](
        *strided(out, (0, 1, 2)),
        *strided(lse, (0, 1)),
        *strided(last_contiguous(part), (0, 1, 2)),
        *strided(last_contiguous(part_lse), (0, 1)),
        rows,
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        BLOCK=_BLOCK,
    )


@triton.jit
def _delta_kernel(
    dout,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    out,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    delta,  # contiguous
    rows,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a tensor may have more than 2^31 elements.
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED_DIM)[None, :]
    inside = (row < rows)[:, None] & (column < DIM)
    dout_at = dout + batch * dout_stride_b + head * dout_stride_h + row[:, None] * dout_stride_s + column
    out_at = out + batch * out_stride_b + head * out_stride_h + row[:, None] * out_stride_s + column
    left = tl.load(dout_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + (batch * tl.num_programs(1) + head) * rows + row, tl.sum(left * right, 1), mask=row < rows)


@triton.jit
def _merge_kernel(
    out,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse,
    lse_stride_b,
    lse_stride_h,
    part,
    part_stride_b,
    part_stride_s,
    part_stride_h,
    part_lse,
    part_lse_stride_b,
    part_lse_stride_h,
    rows,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED_DIM)[None, :]
    inside = (row < rows)[:, None] & (column < DIM)
    lse_at = lse + batch * lse_stride_b + head * lse_stride_h + row
    part_lse_at = part_lse + batch * part_lse_stride_b + head * part_lse_stride_h + row
    old_lse = tl.load(lse_at, mask=row < rows, other=float("-inf"))
    new_lse = tl.load(part_lse_at, mask=row < rows, other=float("-inf"))
    merged, old_weight, new_weight = merge_weights(old_lse, new_lse)
    out_at = out + batch * out_stride_b + head * out_stride_h + row[:, None] * out_stride_s + column
    part_at = part + batch * part_stride_b + head * part_stride_h + row[:, None] * part_stride_s + column
    old = tl.load(out_at, mask=inside, other=0.0)
    new = tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, old * old_weight[:, None] + new * new_weight[:, None], mask=inside)
    tl.store(lse_at, merged, mask=row < rows)


@triton.jit
def merge_weights(a, b):
    """log(exp(a) + exp(b)), and the weights of both sides in it; -inf on a side leaves the other as it is."""
    peak = tl.maximum(a, b)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    merged = peak + tl.log(tl.exp(a - peak) + tl.exp(b - peak))
    safe = tl.where(merged == float("-inf"), 0.0, merged)
    return merged, tl.exp(a - safe), tl.exp(b - safe)
