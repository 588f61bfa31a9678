"""The backward kernels: one pass for dq, one for dk and dv, each program the only one to write its part.

So there are no atomics and results repeat bit for bit. With P = exp(scale q k - lse) and dS = P (dout v - delta):
dq = scale dS k, dk = scale dS^T q, dv = P^T dout (FlashAttention-2, arXiv:2307.08691). lse and delta are those of the
whole row, whatever part of its keys is given, so the shares of several calls add up to the whole gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.triton.portable.walk import block_of, listed_walk, row_bounds, row_walk, visible

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dq_kernel(
    q_desc,  # [B, H, S, D]
    k_desc,  # [B, Hkv, N, D]
    v_desc,  # [B, Hkv, N, Dv]
    dout_desc,  # [B, H, S, Dv]
    lse,  # [B, H, S]
    lse_stride_b,
    lse_stride_h,
    delta,  # [B, H, S]
    delta_stride_b,
    delta_stride_h,
    dq,  # [B, H, S, D]
    dq_stride_b,
    dq_stride_h,
    dq_stride_s,
    begin,
    end,
    anchor_begin,
    anchor_end,
    full_start,  # TileMap.by_row
    full_tiles,
    partial_start,
    partial_tiles,
    longest_first,
    mask_stride,
    rows,
    keys,
    offset,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one tile of rows and one query head; arguments as in the forward kernel."""
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUP
    SPLIT: tl.constexpr = TILE // BLOCK_N if LISTS else 1
    # fmt: off
    first_row, full_first, full_stop, partial_first, partial_stop = row_walk(
        batch, rows, keys, offset, full_start, partial_start, longest_first, mask_stride,
        LISTS, SPLIT, TILE, BLOCK_M, BLOCK_N,
    )
    # fmt: on
    row = first_row + tl.arange(0, BLOCK_M)

    q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
    dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
    row_lse, row_delta = _row_statistics(
        lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
    )
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)

    for i in tl.range(full_first, full_stop):
        key = block_of(full_tiles, i, LISTS, SPLIT, TILE, BLOCK_N)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_DIM)
        v = v_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - row_lse[:, None])
        ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - row_delta[:, None])
        total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)

    bounds = row_bounds(
        row, rows, keys, offset, begin, end, anchor_begin, anchor_end, batch * mask_stride * rows, LISTS
    )
    for i in tl.range(partial_first, partial_stop):
        key = block_of(partial_tiles, i, LISTS, SPLIT, TILE, BLOCK_N)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_DIM)
        v = v_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - row_lse[:, None])
        p = tl.where(visible(key + tl.arange(0, BLOCK_N), bounds, 0), p, 0.0)
        ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - row_delta[:, None])
        total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)

    at = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
    _write(at, dq_stride_s, row, rows, total * scale, DIM, PADDED_DIM, ACCUMULATE)


@triton.jit
def dkdv_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse,
    lse_stride_b,
    lse_stride_h,
    delta,
    delta_stride_b,
    delta_stride_h,
    dk,  # [B, Hkv, N, D]
    dk_stride_b,
    dk_stride_h,
    dk_stride_s,
    dv,  # [B, Hkv, N, Dv]
    dv_stride_b,
    dv_stride_h,
    dv_stride_s,
    begin,
    end,
    anchor_begin,
    anchor_end,
    full_start,  # TileMap.by_key
    full_tiles,
    partial_start,
    partial_tiles,
    longest_first,
    mask_stride,
    rows,
    keys,
    offset,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    ACCUMULATE_DK: tl.constexpr,
    ACCUMULATE_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile of keys and one kv head: the sum over the rows that see it and its query heads."""
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    SPLIT: tl.constexpr = TILE // BLOCK_M if LISTS else 1
    if LISTS:
        first_key, full_first, full_stop, partial_first, partial_stop = listed_walk(
            batch, keys, full_start, partial_start, longest_first, mask_stride, SPLIT, TILE, BLOCK_N
        )
    else:
        first_key = tl.program_id(0) * BLOCK_N
        # The first row that sees the first key, and the first that sees all keys that exist.
        partial_first = tl.minimum(tl.maximum(first_key - offset, 0), rows) // BLOCK_M
        last_key = tl.minimum(first_key + BLOCK_N, keys) - 1
        full_first = tl.cdiv(tl.minimum(tl.maximum(last_key - offset, 0), rows), BLOCK_M)
        full_stop = tl.cdiv(rows, BLOCK_M)
        partial_stop = full_first
    key = first_key + tl.arange(0, BLOCK_N)

    k = k_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, PADDED_DIM)
    v = v_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
    dk_total = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    dv_total = tl.zeros([BLOCK_N, PADDED_VALUE_DIM], tl.float32)

    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        for i in tl.range(partial_first, partial_stop):
            first_row = block_of(partial_tiles, i, LISTS, SPLIT, TILE, BLOCK_M)
            q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
            dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
            row = first_row + tl.arange(0, BLOCK_M)
            row_lse, row_delta = _row_statistics(
                lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
            )
            bounds = row_bounds(
                row, rows, keys, offset, begin, end, anchor_begin, anchor_end, batch * mask_stride * rows, LISTS
            )
            scores = tl.dot(k, q.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - row_lse[None, :])
            p = tl.where(visible(key, bounds, 1), p, 0.0)
            dv_total = tl.dot(p.to(dout.dtype), dout, dv_total, input_precision=PRECISION)
            ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - row_delta[None, :])
            dk_total = tl.dot(ds.to(q.dtype), q, dk_total, input_precision=PRECISION)
        for i in tl.range(full_first, full_stop):
            first_row = block_of(full_tiles, i, LISTS, SPLIT, TILE, BLOCK_M)
            q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
            dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
            row = first_row + tl.arange(0, BLOCK_M)
            row_lse, row_delta = _row_statistics(
                lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
            )
            scores = tl.dot(k, q.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - row_lse[None, :])
            dv_total = tl.dot(p.to(dout.dtype), dout, dv_total, input_precision=PRECISION)
            ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - row_delta[None, :])
            dk_total = tl.dot(ds.to(q.dtype), q, dk_total, input_precision=PRECISION)

    dk_at = dk + batch.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
    _write(dk_at, dk_stride_s, key, keys, dk_total * scale, DIM, PADDED_DIM, ACCUMULATE_DK)
    dv_at = dv + batch.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
    _write(dv_at, dv_stride_s, key, keys, dv_total, VALUE_DIM, PADDED_VALUE_DIM, ACCUMULATE_DV)


@triton.jit
def _row_statistics(lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows):
    """lse to base 2 and delta of some rows; +inf, so that exp gives 0, for rows that are absent or see nothing."""
    lse_at = lse + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + row
    delta_at = delta + batch.to(tl.int64) * delta_stride_b + head.to(tl.int64) * delta_stride_h + row
    row_lse = tl.load(lse_at, mask=row < rows, other=float("inf")) * LOG2_E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    return row_lse, tl.load(delta_at, mask=row < rows, other=0.0)


@triton.jit
def _write(at, stride, row, rows, gradient, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Stores some rows of a gradient, or adds them to what is there. 64 bits: tensors may pass 2^31 elements."""
    column = tl.arange(0, PADDED_DIM)[None, :]
    at += row[:, None].to(tl.int64) * stride + column
    inside = (row < rows)[:, None] & (column < DIM)
    if ACCUMULATE:
        gradient += tl.load(at, mask=inside, other=0.0)
    tl.store(at, gradient.to(at.dtype.element_ty), mask=inside)
