"""The passes as kernels: a program handles one query head and one tile of 128 keys, and walks the sets of probes.

Whatever the number of devices that share the keys, it computes the same product of the same numbers, so that a pair's
score has the same bits; what is summed over pairs are integers. Exponents are to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_weights_kernel(
    q,  # [B, H, probes, D]
    k,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    begin,  # the probes' bounds in key slots, [mask batch, probes]
    end,
    anchor_begin,
    anchor_end,
    blocks,  # of the probes, [mask batch, probes]
    k_blocks,
    mask_stride,  # 0 where the whole batch shares one mask, else 1
    keys,
    sets,
    scale_log2,
    exponents,  # [B, H, key tiles, probes]
    sums,
    NONE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    head, tile, batch, line = _place()
    keys_tile = _keys(k, k_stride_b, k_stride_s, k_stride_h, batch, head // GROUP, tile, keys, DIM, PADDED_DIM, TILE)
    first = (line * tl.num_programs(1) + tile) * sets * SIZE
    for i in tl.range(0, sets):
        seen = _seen(begin, end, anchor_begin, anchor_end, batch * mask_stride * sets + i, tile, keys, SIZE, TILE)
        exponent = tl.full([SIZE], NONE, tl.int32)
        total = tl.zeros([SIZE], tl.int32)
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
            scores = _scores(q, keys_tile, seen, line * sets + i, scale_log2, DIM, PADDED_DIM, SIZE)
            highest = tl.max(scores, 1)
            sees = highest > float("-inf")
            above = tl.where(sees, tl.ceil(highest), 0.0)
            total = tl.sum((tl.exp2(scores - above[:, None]) * UNIT + 0.5).to(tl.int32), 1)
            exponent = tl.where(sees, above.to(tl.int32), NONE)
        at = first + i * SIZE + tl.arange(0, SIZE)
        tl.store(exponents + at, exponent)
        tl.store(sums + at, total)


@triton.jit
def column_scores_kernel(
    q,
    k,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    begin,
    end,
    anchor_begin,
    anchor_end,
    blocks,
    k_blocks,
    mask_stride,
    keys,
    sets,
    scale_log2,
    lse,  # [B, H, probes], to base 2
    unit,
    local_blocks,
    sinks,
    ranked,  # [B, H, N]
    totals,  # [B, H, key tiles, 3]
    QUARTERS: tl.constexpr,
    STANDS_OUT: tl.constexpr,
    PLACE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    head, tile, batch, line = _place()
    keys_tile = _keys(k, k_stride_b, k_stride_s, k_stride_h, batch, head // GROUP, tile, keys, DIM, PADDED_DIM, TILE)
    block = tl.load(k_blocks + tile)
    columns = tl.zeros([TILE], tl.int64)
    always = tl.zeros([], tl.int64)
    in_all = tl.zeros([], tl.int64)
    for i in tl.range(0, sets):
        set_ = batch * mask_stride * sets + i
        seen = _seen(begin, end, anchor_begin, anchor_end, set_, tile, keys, SIZE, TILE)
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
            scores = _scores(q, keys_tile, seen, line * sets + i, scale_log2, DIM, PADDED_DIM, SIZE)
            masses = _masses(scores, lse, line * sets + i, unit, SIZE)
            taken = _always(blocks, set_, block, local_blocks, sinks, SIZE, TILE)
            quarters = tl.reshape(tl.where(taken, 0, masses), [QUARTERS, SIZE // QUARTERS, TILE])
            quarters = tl.sum(quarters.to(tl.int64), 1)
            of_tile = tl.sum(tl.sum(quarters, 1), 0)
            of_all = tl.sum(tl.sum(masses.to(tl.int64), 1), 0)
            least = tl.min(quarters, 0) * QUARTERS
            columns += tl.where(least * TILE >= of_tile * STANDS_OUT, least, 0)
            always += of_all - of_tile
            in_all += of_all
    slot = tile * TILE + tl.arange(0, TILE)
    position = block * TILE + tl.arange(0, TILE)
    candidates = (columns << PLACE_BITS) | ((1 << PLACE_BITS) - 1 - position)
    tl.store(ranked + line * keys + slot, candidates, mask=slot < keys)
    at = totals + (line * tl.num_programs(1) + tile) * 3
    tl.store(at, always)
    tl.store(at + 1, in_all)
    tl.store(at + 2, tl.sum(columns, 0))


@triton.jit
def diagonal_masses_kernel(
    q,
    k,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    begin,
    end,
    anchor_begin,
    anchor_end,
    blocks,
    k_blocks,
    mask_stride,
    keys,
    sets,
    scale_log2,
    lse,  # [B, H, probes], to base 2
    unit,
    local_blocks,
    sinks,
    chosen,  # [B, H, N]
    first_block,  # [mask batch, sets]
    left,  # [B, H, sets, 2, key tiles]
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    head, tile, batch, line = _place()
    keys_tile = _keys(k, k_stride_b, k_stride_s, k_stride_h, batch, head // GROUP, tile, keys, DIM, PADDED_DIM, TILE)
    block = tl.load(k_blocks + tile)
    slot = tile * TILE + tl.arange(0, TILE)
    column = tl.load(chosen + line * keys + slot, mask=slot < keys, other=0) != 0
    for i in tl.range(0, sets):
        set_ = batch * mask_stride * sets + i
        seen = _seen(begin, end, anchor_begin, anchor_end, set_, tile, keys, SIZE, TILE)
        in_first = tl.zeros([], tl.int64)
        in_second = tl.zeros([], tl.int64)
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
            scores = _scores(q, keys_tile, seen, line * sets + i, scale_log2, DIM, PADDED_DIM, SIZE)
            masses = _masses(scores, lse, line * sets + i, unit, SIZE)
            taken = _always(blocks, set_, block, local_blocks, sinks, SIZE, TILE) | column[None, :]
            of_rows = tl.sum(tl.where(taken, 0, masses).to(tl.int64), 1)
            second = tl.load(blocks + set_ * SIZE + tl.arange(0, SIZE)) > tl.load(first_block + set_)
            in_second = tl.sum(tl.where(second, of_rows, 0), 0)
            in_first = tl.sum(of_rows, 0) - in_second
        at = left + (line * sets + i) * 2 * tl.num_programs(1) + tile
        tl.store(at, in_first)
        tl.store(at + tl.num_programs(1), in_second)


@triton.jit
def _place():
    """Query head, tile of keys, row of the batch, and the head's number in the batch, which addresses: 64 bits."""
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    return head, tile, batch, batch.to(tl.int64) * tl.num_programs(0) + head


@triton.jit
def _keys(
    k,
    stride_b,
    stride_s,
    stride_h,
    batch,
    kv_head,
    tile,
    keys,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    slot = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, PADDED)
    at = k + batch.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    at += slot[:, None] * stride_s + column[None, :]
    return tl.load(at, mask=(slot < keys)[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _seen(begin, end, anchor_begin, anchor_end, set_, tile, keys, SIZE: tl.constexpr, TILE: tl.constexpr):
    row = set_ * SIZE + tl.arange(0, SIZE)
    slot = (tile * TILE + tl.arange(0, TILE))[None, :]
    seen = (slot >= tl.load(begin + row)[:, None]) & (slot < tl.load(end + row)[:, None])
    seen |= (slot >= tl.load(anchor_begin + row)[:, None]) & (slot < tl.load(anchor_end + row)[:, None])
    return seen


@triton.jit
def _scores(q, keys_tile, seen, set_of_line, scale_log2, DIM: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr):
    """fp32 [SIZE, TILE] to base 2, -inf where nothing is seen."""
    row = set_of_line * SIZE + tl.arange(0, SIZE)
    column = tl.arange(0, PADDED)
    queries = tl.load(q + row[:, None] * DIM + column[None, :], mask=(column < DIM)[None, :], other=0.0)
    products = tl.dot(queries, keys_tile.T, input_precision="ieee")
    return tl.where(seen, products * scale_log2, float("-inf"))


@triton.jit
def _masses(scores, lse, set_of_line, unit, SIZE: tl.constexpr):
    """int32 [SIZE, TILE]: at most 2 ** 30."""
    of_row = tl.load(lse + set_of_line * SIZE + tl.arange(0, SIZE))
    return (tl.exp2(scores - of_row[:, None]) * unit + 0.5).to(tl.int32)


@triton.jit
def _always(blocks, set_, block, local_blocks, sinks, SIZE: tl.constexpr, TILE: tl.constexpr):
    near = tl.load(blocks + set_ * SIZE + tl.arange(0, SIZE)) - block < local_blocks
    return near[:, None] | (block * TILE + tl.arange(0, TILE) < sinks)[None, :]
