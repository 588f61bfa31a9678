"""The forward kernel: one program a tile of rows and query head (FlashAttention-2, arXiv:2307.08691).

A program walks the tiles of keys that its rows meet with an online softmax: first those where everything is visible,
without any test, then those where elements are tested; under a sparse index, then its columns, gathered one by one.
Exponents are to base 2; `scale_log2` is scale x log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.triton.portable.columns import chosen, column_walk, gathered
from farspan.kernels.triton.portable.walk import block_of, computed, row_bounds, row_walk, visible
from farspan.kernels.triton.rows import merge_weights

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_kernel(
    q_desc,  # [B, H, S, D]
    k_desc,  # [B, Hkv, N, D]
    v_desc,  # [B, Hkv, N, Dv]
    out,  # [B, H, S, Dv]
    out_stride_b,
    out_stride_h,
    out_stride_s,
    lse,  # [B, H, S]
    lse_stride_b,
    lse_stride_h,
    begin,  # the mask's bounds, [mask batch, S]
    end,
    anchor_begin,
    anchor_end,
    full_start,  # TileMap.by_row
    full_tiles,
    partial_start,
    partial_tiles,
    longest_first,
    mask_stride,  # 0 where the whole batch shares one mask, else 1
    lists_stride_b,  # rows of lists from one batch element to the next, and from head to head; 0 where they share
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
    scale_log2,
    GROUP: tl.constexpr,  # query heads that read one kv head
    TILES: tl.constexpr,  # else nothing but columns
    LISTS: tl.constexpr,  # visit the tiles of the lists; else row q sees [0, min(q + 1 + offset, keys))
    COLUMNS: tl.constexpr,  # a sparse index has columns besides its tiles
    CHUNKS: tl.constexpr,  # of its tiles each row computes those of its chunks; none is listed as seen in full
    ACCUMULATE: tl.constexpr,  # merge into what out and lse hold
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
    total = tl.zeros([BLOCK_M, PADDED_VALUE_DIM], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)

    for i in tl.range(full_first, full_stop):
        key = block_of(full_list, i, LISTS, SPLIT, TILE, BLOCK_N)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_DIM)
        v = v_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        total, highest, weight = _online_softmax(scores, v, total, highest, weight, scale_log2, PRECISION)

    bounds = row_bounds(
        row, rows, keys, offset, begin, end, anchor_begin, anchor_end, batch * mask_stride * rows, LISTS
    )
    for i in tl.range(partial_first, partial_stop):
        key = block_of(partial_list, i, LISTS, SPLIT, TILE, BLOCK_N)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_DIM)
        v = v_desc.load([batch, kv_head, key, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        seen = visible(key + tl.arange(0, BLOCK_N), bounds, 0)
        if CHUNKS:
            own = computed(chunks, chunks_stride_b, chunks_stride_h, key_at, batch, head, row, rows, key, TILE)
            seen = seen & own[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        total, highest, weight = _online_softmax(scores, v, total, highest, weight, scale_log2, PRECISION)

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
            seen = visible(slot, bounds, 0) & wanted[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            total, highest, weight = _online_softmax(scores, v, total, highest, weight, scale_log2, PRECISION)
        # fmt: on

    blind = weight == 0
    part = total / tl.where(blind, 1.0, weight)[:, None]
    part_lse = tl.where(blind, float("-inf"), (highest + tl.log2(weight)) * LN_2)

    column = tl.arange(0, PADDED_VALUE_DIM)
    present = row < rows
    inside = present[:, None] & (column < VALUE_DIM)[None, :]
    # 64 bits: a tensor may have more than 2^31 elements.
    out_at = out + batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_at += row[:, None].to(tl.int64) * out_stride_s + column[None, :]
    lse_at = lse + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + row
    if ACCUMULATE:
        old_lse = tl.load(lse_at, mask=present, other=float("-inf"))
        part_lse, old_weight, part_weight = merge_weights(old_lse, part_lse)
        old = tl.load(out_at, mask=inside, other=0.0)
        part = old * old_weight[:, None] + part * part_weight[:, None]
    tl.store(out_at, part.to(out.dtype.element_ty), mask=inside)
    tl.store(lse_at, part_lse, mask=present)


@triton.jit
def _online_softmax(scores, v, total, highest, weight, scale_log2, PRECISION: tl.constexpr):
    """Takes a block of raw scores into the running output, maximum (scaled, base 2) and sum of weights."""
    higher = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet has -inf, which minus itself would be NaN.
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores * scale_log2 - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
    return total, higher, weight * shrink + tl.sum(p, 1)
