"""The backward kernels: one pass for dq, one for dk and dv, each program the only one to write its part.

So there are no atomics and results repeat bit for bit. With P = exp(scale q k - lse) and dS = P (dout v - delta):
dq = scale dS k, dk = scale dS^T q, dv = P^T dout (FlashAttention-2, arXiv:2307.08691). lse and delta are those of the
whole row, whatever part of its keys is given, so the shares of several calls add up to the whole gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.triton.portable.columns import chosen, column_walk, gathered
from farspan.kernels.triton.portable.walk import (
    block_of,
    computed,
    key_walk,
    listed_place,
    of_member,
    row_bounds,
    row_statistics,
    row_walk,
    visible,
    write_rows,
)


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
    lists_stride_b,
    lists_stride_h,
    k_rows,  # what k_desc and v_desc describe, for columns
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_rows,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    column_slots,  # Columns
    column_at,
    column_first,
    column_stop,
    columns_stride_b,
    table,  # Selection
    table_stride_b,
    table_stride_h,
    table_places,
    row_at,
    most,  # columns of a head
    chunks,  # Selection.chunks
    chunks_stride_b,
    chunks_stride_h,
    key_at,
    rows,
    keys,
    offset,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    LISTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one tile of rows and one query head; arguments as in the forward kernel."""
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUP
    lists = batch * lists_stride_b + head * lists_stride_h
    SPLIT: tl.constexpr = TILE // BLOCK_N if LISTS else 1
    # fmt: off
    first_row, full_list, full_first, full_stop, partial_list, partial_first, partial_stop = row_walk(
        lists, batch * mask_stride, rows, keys, offset, full_start, full_tiles, partial_start, partial_tiles,
        longest_first, TILES, LISTS, SPLIT, TILE, BLOCK_M, BLOCK_N,
    )
    # fmt: on
    row = first_row + tl.arange(0, BLOCK_M)

    q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
    dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
    row_lse, row_delta = row_statistics(
        lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
    )
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)

    for i in tl.range(full_first, full_stop):
        key = block_of(full_list, i, LISTS, SPLIT, TILE, BLOCK_N)
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
        key = block_of(partial_list, i, LISTS, SPLIT, TILE, BLOCK_N)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_DIM)
        v = v_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - row_lse[:, None])
        seen = visible(key + tl.arange(0, BLOCK_N), bounds, 0)
        if CHUNKS:
            own = computed(chunks, chunks_stride_b, chunks_stride_h, key_at, batch, head, row, rows, key, TILE)
            seen = seen & own[:, None]
        p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - row_delta[:, None])
        total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)

    if COLUMNS:
        # fmt: off
        slots, slots_at, first_column, stop_column, of_head, row_place = column_walk(
            batch, head, first_row, rows, most, column_slots, column_at, columns_stride_b, column_first, column_stop,
            table, table_stride_b, table_stride_h, row_at, TILE,
        )
        for i in tl.range(first_column, stop_column, BLOCK_N):
            place = i + tl.arange(0, BLOCK_N)
            slot = tl.load(slots + place, mask=place < stop_column, other=keys)
            column_place = row_place + tl.load(slots_at + place, mask=place < stop_column, other=0)
            wanted = (slot < keys) & ~chosen(of_head, column_place, table_places)
            k = gathered(k_rows, k_stride_b, k_stride_h, k_stride_s, batch, kv_head, slot, wanted, DIM, PADDED_DIM)
            v = gathered(
                v_rows, v_stride_b, v_stride_h, v_stride_s, batch, kv_head, slot, wanted, VALUE_DIM, PADDED_VALUE_DIM
            )
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - row_lse[:, None])
            p = tl.where(visible(slot, bounds, 0) & wanted[None, :], p, 0.0)
            ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - row_delta[:, None])
            total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)
        # fmt: on

    at = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
    write_rows(at, dq_stride_s, row, rows, total * scale, DIM, PADDED_DIM, ACCUMULATE)


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
    lists_stride_b,
    lists_stride_h,
    column_places,  # Columns
    columns_stride_b,
    dk_columns,  # [B, H, most, D]: what each query head gives to its columns, as made by the column kernel
    dv_columns,  # [B, H, most, Dv]
    most,
    chunks,  # Selection.chunks
    chunks_stride_b,
    chunks_stride_h,
    key_at,
    rows,
    keys,
    offset,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    LISTS: tl.constexpr,
    SPARSE: tl.constexpr,  # the lists are of a sparse index
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
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
        first_key = listed_place(batch * mask_stride, keys, longest_first, TILE, BLOCK_N)
    else:
        first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)

    k = k_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, PADDED_DIM)
    v = v_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
    dk_total = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    dv_total = tl.zeros([BLOCK_N, PADDED_VALUE_DIM], tl.float32)

    if COLUMNS:
        for member in tl.range(0, GROUP):
            head = kv_head * GROUP + member
            heads = tl.num_programs(1) * GROUP
            of_head = (batch * columns_stride_b + head).to(tl.int64) * (keys + 1)
            place = tl.load(column_places + of_head + key, mask=key < keys, other=0) - 1
            # fmt: off
            dk_total += gathered(
                dk_columns, heads * most * DIM, most * DIM, DIM, batch, head, place, place >= 0, DIM, PADDED_DIM
            )
            dv_total += gathered(
                dv_columns, heads * most * VALUE_DIM, most * VALUE_DIM, VALUE_DIM, batch, head, place, place >= 0,
                VALUE_DIM, PADDED_VALUE_DIM,
            )
            # fmt: on
    # Lists of a sparse index name the member of the group with each tile, so they are walked once.
    for walk in tl.range(0, 1 if SPARSE else GROUP):
        # fmt: off
        full_list, full_first, full_stop, partial_list, partial_first, partial_stop = key_walk(
            batch * lists_stride_b + kv_head * lists_stride_h, first_key, rows, keys, offset,
            full_start, full_tiles, partial_start, partial_tiles, TILES, LISTS, SPLIT, TILE, BLOCK_M, BLOCK_N,
        )
        # fmt: on
        for i in tl.range(partial_first, partial_stop):
            first_row = block_of(partial_list, i, LISTS, SPLIT, TILE, BLOCK_M)
            head, first_row = of_member(kv_head * GROUP, walk, first_row, rows, SPARSE, TILE)
            q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
            dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
            row = first_row + tl.arange(0, BLOCK_M)
            row_lse, row_delta = row_statistics(
                lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
            )
            bounds = row_bounds(
                row, rows, keys, offset, begin, end, anchor_begin, anchor_end, batch * mask_stride * rows, LISTS
            )
            scores = tl.dot(k, q.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - row_lse[None, :])
            seen = visible(key, bounds, 1)
            if CHUNKS:
                own = computed(
                    chunks, chunks_stride_b, chunks_stride_h, key_at, batch, head, row, rows, first_key, TILE
                )
                seen = seen & own[None, :]
            p = tl.where(seen, p, 0.0)
            dv_total = tl.dot(p.to(dout.dtype), dout, dv_total, input_precision=PRECISION)
            ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - row_delta[None, :])
            dk_total = tl.dot(ds.to(q.dtype), q, dk_total, input_precision=PRECISION)
        for i in tl.range(full_first, full_stop):
            first_row = block_of(full_list, i, LISTS, SPLIT, TILE, BLOCK_M)
            head, first_row = of_member(kv_head * GROUP, walk, first_row, rows, SPARSE, TILE)
            q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_DIM)
            dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, PADDED_VALUE_DIM)
            row = first_row + tl.arange(0, BLOCK_M)
            row_lse, row_delta = row_statistics(
                lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows
            )
            scores = tl.dot(k, q.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - row_lse[None, :])
            dv_total = tl.dot(p.to(dout.dtype), dout, dv_total, input_precision=PRECISION)
            ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - row_delta[None, :])
            dk_total = tl.dot(ds.to(q.dtype), q, dk_total, input_precision=PRECISION)

    dk_at = dk + batch.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
    write_rows(dk_at, dk_stride_s, key, keys, dk_total * scale, DIM, PADDED_DIM, ACCUMULATE_DK)
    dv_at = dv + batch.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
    write_rows(dv_at, dv_stride_s, key, keys, dv_total, VALUE_DIM, PADDED_VALUE_DIM, ACCUMULATE_DV)
