"""The passes as kernels: a program handles one tile of 128 keys, and walks query heads that read it and sets of probes.

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
    kv_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    keys_tile = _keys(k, k_stride_b, k_stride_s, k_stride_h, batch, kv_head, tile, keys, DIM, PADDED_DIM, TILE)
    bounds = (begin, end, anchor_begin, anchor_end)
    for member in tl.range(0, GROUP):
        line = _line(batch, kv_head, member, GROUP)
        for i in tl.range(0, sets):
            set_ = batch * mask_stride * sets + i
            exponent = tl.full([SIZE], NONE, tl.int32)
            total = tl.zeros([SIZE], tl.int32)
            if _reaches(bounds, set_, tile, SIZE, TILE):
                seen = _seen(bounds, set_, tile, SIZE, TILE)
                scores = _scores(q, keys_tile, seen, line * sets + i, scale_log2, DIM, PADDED_DIM, SIZE)
                highest = tl.max(scores, 1)
                sees = highest > float("-inf")
                above = tl.where(sees, tl.ceil(highest), 0.0)
                total = tl.sum((tl.exp2(scores - above[:, None]) * UNIT + 0.5).to(tl.int32), 1)
                exponent = tl.where(sees, above.to(tl.int32), NONE)
            at = ((line * tl.num_programs(1) + tile) * sets + i) * SIZE + tl.arange(0, SIZE)
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
    kv_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    keys_tile = _keys(k, k_stride_b, k_stride_s, k_stride_h, batch, kv_head, tile, keys, DIM, PADDED_DIM, TILE)
    bounds = (begin, end, anchor_begin, anchor_end)
    block = tl.load(k_blocks + tile)
    slot = tile * TILE + tl.arange(0, TILE)
    place = (1 << PLACE_BITS) - 1 - (block * TILE + tl.arange(0, TILE))
    for member in tl.range(0, GROUP):
        line = _line(batch, kv_head, member, GROUP)
        columns = tl.zeros([TILE], tl.int64)
        always = tl.zeros([], tl.int64)
        others = tl.zeros([], tl.int64)
        for i in tl.range(0, sets):
            set_ = batch * mask_stride * sets + i
            if _reaches(bounds, set_, tile, SIZE, TILE):
                seen = _seen(bounds, set_, tile, SIZE, TILE)
                scores = _scores(q, keys_tile, seen, line * sets + i, scale_log2, DIM, PADDED_DIM, SIZE)
                masses = _masses(scores, lse, line * sets + i, unit, SIZE)
                if _has_always(blocks, set_, block, local_blocks, sinks, SIZE, TILE):
                    taken = _always(blocks, set_, block, local_blocks, sinks, SIZE, TILE)
                    always += tl.sum(tl.sum(tl.where(taken, masses, 0).to(tl.int64), 1), 0)
                    masses = tl.where(taken, 0, masses)
                quarters = tl.sum(tl.reshape(masses, [QUARTERS, SIZE // QUARTERS, TILE]).to(tl.int64), 1)
                of_tile = tl.sum(tl.sum(quarters, 1), 0)
                least = tl.min(quarters, 0) * QUARTERS
                columns += tl.where(least * TILE >= of_tile * STANDS_OUT, least, 0)
                others += of_tile
        tl.store(ranked + line * keys + slot, (columns << PLACE_BITS) | place, mask=slot < keys)
        at = totals + (line * tl.num_programs(1) + tile) * 3
        tl.store(at, always)
        tl.store(at + 1, always + others)
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
    kv_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    keys_tile = _keys(k, k_stride_b, k_stride_s, k_stride_h, batch, kv_head, tile, keys, DIM, PADDED_DIM, TILE)
    bounds = (begin, end, anchor_begin, anchor_end)
    block = tl.load(k_blocks + tile)
    slot = tile * TILE + tl.arange(0, TILE)
    for member in tl.range(0, GROUP):
        line = _line(batch, kv_head, member, GROUP)
        column = tl.load(chosen + line * keys + slot, mask=slot < keys, other=0) != 0
        for i in tl.range(0, sets):
            set_ = batch * mask_stride * sets + i
            in_first = tl.zeros([], tl.int64)
            in_second = tl.zeros([], tl.int64)
            if _reaches(bounds, set_, tile, SIZE, TILE):
                seen = _seen(bounds, set_, tile, SIZE, TILE) & ~column[None, :]
                scores = _scores(q, keys_tile, seen, line * sets + i, scale_log2, DIM, PADDED_DIM, SIZE)
                masses = _masses(scores, lse, line * sets + i, unit, SIZE)
                if _has_always(blocks, set_, block, local_blocks, sinks, SIZE, TILE):
                    masses = tl.where(_always(blocks, set_, block, local_blocks, sinks, SIZE, TILE), 0, masses)
                of_rows = tl.sum(masses.to(tl.int64), 1)
                second = tl.load(blocks + set_ * SIZE + tl.arange(0, SIZE)) > tl.load(first_block + set_)
                in_second = tl.sum(tl.where(second, of_rows, 0), 0)
                in_first = tl.sum(of_rows, 0) - in_second
            at = left + (line * sets + i) * 2 * tl.num_programs(1) + tile
            tl.store(at, in_first)
            tl.store(at + tl.num_programs(1), in_second)


@triton.jit
def _line(batch, kv_head, member, GROUP: tl.constexpr):
    """A query head's number in the batch, which addresses: 64 bits."""
    return (batch.to(tl.int64) * tl.num_programs(0) + kv_head) * GROUP + member


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
def _reaches(bounds, set_, tile, SIZE: tl.constexpr, TILE: tl.constexpr):
    """False where no row of a set sees a key of the tile."""
    begin, end, anchor_begin, anchor_end = bounds
    row = set_ * SIZE + tl.arange(0, SIZE)
    first, stop = tile * TILE, tile * TILE + TILE
    sees = (tl.load(begin + row) < stop) & (tl.load(end + row) > first)
    sees |= (tl.load(anchor_begin + row) < stop) & (tl.load(anchor_end + row) > first)
    return tl.max(sees.to(tl.int32), 0) > 0


@triton.jit
def _seen(bounds, set_, tile, SIZE: tl.constexpr, TILE: tl.constexpr):
    begin, end, anchor_begin, anchor_end = bounds
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
def _has_always(blocks, set_, block, local_blocks, sinks, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Whether some pair of a set and a tile is always computed, as few are."""
    nearest = tl.min(tl.load(blocks + set_ * SIZE + tl.arange(0, SIZE)), 0)
    return (nearest - block < local_blocks) | (block * TILE < sinks)


@triton.jit
def _always(blocks, set_, block, local_blocks, sinks, SIZE: tl.constexpr, TILE: tl.constexpr):
    near = tl.load(blocks + set_ * SIZE + tl.arange(0, SIZE)) - block < local_blocks
    return near[:, None] | (block * TILE + tl.arange(0, TILE) < sinks)[None, :]
