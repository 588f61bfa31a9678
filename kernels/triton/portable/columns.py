"""Single keys of a sparse index: taking them row by row from k and v, and the kernel for their dk and dv.

A column is computed where the mask shows it and no selected tile holds it, so nothing is computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.triton.portable.walk import row_bounds, row_statistics, visible, write_rows


@triton.jit
def column_walk(
    batch,
    head,
    first_row,
    rows,
    most,
    column_slots,
    column_at,
    columns_stride_b,
    column_first,
    column_stop,
    table,
    table_stride_b,
    table_stride_h,
    row_at,
    TILE: tl.constexpr,
):
    """A head's columns, those that a row of the tile may see as `[first, stop)` of them, and the tile's selection."""
    of_head = (batch * columns_stride_b + head).to(tl.int64) * most
    entry = (batch * tl.num_programs(1) + head) * tl.cdiv(rows, TILE) + first_row // TILE
    table += batch.to(tl.int64) * table_stride_b + head.to(tl.int64) * table_stride_h
    row_place = tl.load(row_at + first_row // TILE)
    first, stop = tl.load(column_first + entry), tl.load(column_stop + entry)
    return column_slots + of_head, column_at + of_head, first, stop, table, row_place


@triton.jit
def chosen(table, place, places):
    """Whether tiles are selected, see `Selection`."""
    return tl.load(table + place, mask=(place >= 0) & (place < places), other=0) != 0


@triton.jit
def gathered(x, stride_b, stride_h, stride_s, batch, head, slot, wanted, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows of `[B, H, N, D]`, zeros where they are not wanted. 64 bits: tensors may pass 2^31 elements."""
    dim = tl.arange(0, PADDED_DIM)[None, :]
    x += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return tl.load(x + slot[:, None].to(tl.int64) * stride_s + dim, mask=wanted[:, None] & (dim < DIM), other=0.0)


@triton.jit
def column_kernel(
    q_desc,  # [B, H, S, D]
    dout_desc,  # [B, H, S, Dv]
    k,  # [B, Hkv, N, D]
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v,  # [B, Hkv, N, Dv]
    v_stride_b,
    v_stride_h,
    v_stride_s,
    lse,  # [B, H, S]
    lse_stride_b,
    lse_stride_h,
    delta,  # [B, H, S]
    delta_stride_b,
    delta_stride_h,
    dk,  # [shares, B, H, most, D]: for each column the part of dk / scale that its rows' query head gives
    dv,  # [shares, B, H, most, Dv]
    begin,  # the mask's bounds, [mask batch, S]
    end,
    anchor_begin,
    anchor_end,
    mask_stride,
    column_slots,  # Columns
    column_at,
    columns_stride_b,
    first_tile,  # of each group, the row tiles that may see it
    stop_tile,
    table,  # Selection
    table_stride_b,
    table_stride_h,
    table_places,
    row_at,
    most,
    shares,
    rows,
    keys,
    scale_log2,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What one query head gives to dk and dv of a group of its columns, over one share of the rows that see them."""
    head, batch = tl.program_id(1), tl.program_id(2)
    of_head = (batch * columns_stride_b + head).to(tl.int64) * most
    table += batch.to(tl.int64) * table_stride_b + head.to(tl.int64) * table_stride_h
    group, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    place = group * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(column_slots + of_head + place, mask=place < most, other=keys)
    slot_at = tl.load(column_at + of_head + place, mask=place < most, other=0)
    k_group = gathered(k, k_stride_b, k_stride_h, k_stride_s, batch, head // GROUP, slot, slot < keys, DIM, PADDED_DIM)
    v_group = gathered(
        v, v_stride_b, v_stride_h, v_stride_s, batch, head // GROUP, slot, slot < keys, VALUE_DIM, PADDED_VALUE_DIM
    )
    dk_total = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    dv_total = tl.zeros([BLOCK_N, PADDED_VALUE_DIM], tl.float32)

    entry = (batch * tl.num_programs(1) + head) * tl.cdiv(most, BLOCK_N) + group
    first, stop = tl.load(first_tile + entry), tl.load(stop_tile + entry)
    step = tl.cdiv(tl.maximum(stop - first, 0), shares)
    first += share * step
    stop = tl.minimum(first + step, stop)
    for i in tl.range(first * (TILE // BLOCK_M), stop * (TILE // BLOCK_M)):
        first_row = i * BLOCK_M
        row = first_row + tl.arange(0, BLOCK_M)
        q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
        dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
        row_lse, row_delta = row_statistics(
            lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
        )
        bounds = row_bounds(row, rows, keys, 0, begin, end, anchor_begin, anchor_end, batch * mask_stride * rows, True)
        wanted = (slot < keys) & ~chosen(table, tl.load(row_at + first_row // TILE) + slot_at, table_places)
        scores = tl.dot(k_group, q.T, input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - row_lse[None, :])
        p = tl.where(visible(slot, bounds, 1) & wanted[:, None], p, 0.0)
        dv_total = tl.dot(p.to(dout.dtype), dout, dv_total, input_precision=PRECISION)
        ds = p * (tl.dot(v_group, dout.T, input_precision=PRECISION) - row_delta[None, :])
        dk_total = tl.dot(ds.to(q.dtype), q, dk_total, input_precision=PRECISION)

    before = ((share * tl.num_programs(2) + batch).to(tl.int64) * tl.num_programs(1) + head) * most
    write_rows(dk + before * DIM, DIM, place, most, dk_total, DIM, PADDED_DIM, False)
    write_rows(dv + before * VALUE_DIM, VALUE_DIM, place, most, dv_total, VALUE_DIM, PADDED_VALUE_DIM, False)
