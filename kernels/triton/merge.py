"""Merging attention over other keys into a total, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def merge_kernel(
    out,  # [B, S, H, D] fp32
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse,  # [B, H, S] fp32
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
    """out and lse take in part and part_lse; where one side is -inf the other stays bit for bit."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = tl.arange(0, PADDED_DIM)[None, :]
    seen = row < rows
    inside = seen[:, None] & (column < DIM)
    lse_at = lse + batch * lse_stride_b + head * lse_stride_h + row
    a = tl.load(lse_at, mask=seen, other=0.0)
    b = tl.load(part_lse + batch * part_lse_stride_b + head * part_lse_stride_h + row, mask=seen, other=0.0)
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    # Where both are -inf, 0 in place of the higher one: -inf - 0 is no NaN, and the weights are 1 and 0.
    smaller = tl.exp(low - tl.where(high == float("-inf"), 0.0, high))
    share = tl.where(b > a, 1.0, smaller) / (1.0 + smaller)
    out_at = out + batch * out_stride_b + row[:, None] * out_stride_s + head * out_stride_h + column
    part_at = part + batch * part_stride_b + row[:, None] * part_stride_s + head * part_stride_h + column
    total = tl.load(out_at, mask=inside, other=0.0)
    added = tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
    merged = tl.where(share[:, None] == 1.0, added, total + share[:, None] * (added - total))
    tl.store(out_at, merged, mask=inside)
    tl.store(lse_at, high + tl.log(1.0 + smaller), mask=seen)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`farspan.kernels.merge_into` for fp32 totals on a GPU; `part` may be of any dtype.

    The last dims of all four are contiguous.
    """
    batch, rows, heads, dim = out.shape
    block = 32
    merge_kernel[(triton.cdiv(rows, block), heads, batch)](
        out,
        *out.stride()[:3],
        lse,
        *lse.stride()[:2],
        part,
        *part.stride()[:3],
        part_lse,
        *part_lse.stride()[:2],
        rows,
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        BLOCK=block,
    )
