"""lse and delta as the backward kernels for Hopper read them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def statistics_kernel(
    lse,  # [B, H, S]
    lse_stride_b,
    lse_stride_h,
    delta,  # [B, H, S]
    delta_stride_b,
    delta_stride_h,
    packed_lse,  # [B, H, padded S]
    packed_delta,
    rows,
    padded_rows,
    BLOCK: tl.constexpr,
):
    """lse to base 2, and +inf, so that exp2(s - lse) is 0, for rows that see nothing or are past the end; delta."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_lse = tl.load(lse + batch * lse_stride_b + head * lse_stride_h + row, mask=row < rows, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    row_delta = tl.load(delta + batch * delta_stride_b + head * delta_stride_h + row, mask=row < rows, other=0.0)
    at = (batch * tl.num_programs(1) + head) * padded_rows + row
    tl.store(packed_lse + at, row_lse, mask=row < padded_rows)
    tl.store(packed_delta + at, row_delta, mask=row < padded_rows)
