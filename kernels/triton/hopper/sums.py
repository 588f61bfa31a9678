"""The sums of dq in global memory: halves of row tiles, in the order in which registers hold what a product gave.

A warpgroup owns 64 rows of a product, and a thread in it two neighbouring numbers here and two more eight rows below. In
the order of the registers these four lie side by side: one addition of 16 bytes, neighbours to those of other threads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def add_half(sums, value):
    """Adds a product of 64 rows to the sums; the order of several additions to the same is for the caller to keep."""
    COLUMNS: gl.constexpr = value.shape[1]
    parts = value.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([64 * COLUMNS])
    gl.atomic_add(sums + gl.arange(0, 64 * COLUMNS, parts.type.layout), parts, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    sums,  # fp32 [B, H, row tiles, 2 halves, columns / 8, 4 warps, 8, 4, 2, 2]; halves of 128 rows, or of 64's columns
    dq,  # [B, S, H, D]
    dq_stride_b,
    dq_stride_s,
    dq_stride_h,
    rows,
    scale,
    BLOCK_M: tl.constexpr,  # of a row tile
    COLUMNS: tl.constexpr,  # of a half
    ACCUMULATE: tl.constexpr,
):
    """Turns sums into dq: a program a half."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    half = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
    value = tl.load(sums + half * (64 * COLUMNS) + tl.arange(0, 64 * COLUMNS)) * scale
    value = value.reshape(COLUMNS // 8, 4, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5).reshape(64, COLUMNS)
    row, column = tl.arange(0, 64), tl.arange(0, COLUMNS)
    if BLOCK_M == 128:
        row += tl.program_id(0) * 64
    else:
        row += tl.program_id(0) // 2 * 64
        column += tl.program_id(0) % 2 * COLUMNS
    at = dq + batch * dq_stride_b + head * dq_stride_h + row.to(tl.int64)[:, None] * dq_stride_s + column[None, :]
    inside = (row < rows)[:, None]
    if ACCUMULATE:
        value += tl.load(at, mask=inside, other=0.0)
    tl.store(at, value.to(dq.dtype.element_ty), mask=inside)
