"""The dq kernel for Hopper: a program owns 128 rows of a head and walks over the tiles of keys that they see.

One warp loads keys and values into rings; two consumer warpgroups own 64 rows each and run freely against each other,
so that the exponentials of one overlap the products of the other. Three products a tile: S = q k^T, dP = dout v^T,
dq += dS k, where dS goes from registers straight into the last one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from farspan.kernels.triton.hopper.common import (
    load_next,
    make_barriers,
    matrix,
    row_limits,
    visible,
    write_rows,
)
from farspan.kernels.triton.hopper.schedule import listed_tile, listed_walk


@gluon.jit(do_not_specialize=["mask_stride", "rows", "keys", "padded_rows", "heads", "group", "offset"])
def dq_kernel(
    q_desc,  # [B, S, H, D]; boxes of the 64 rows of a consumer
    k_desc,  # [B, N, Hkv, D]; boxes of a key tile
    v_desc,
    dout_desc,  # as q
    lse,  # [B, H, padded S]: to base 2, +inf for rows that see nothing or are past the end
    delta,  # [B, H, padded S]
    dq,  # [B, S, H, D]
    dq_stride_b,
    dq_stride_s,
    dq_stride_h,
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
    rows,
    keys,
    padded_rows,
    heads,
    group,
    offset,
    scale,
    scale_log2,
    LISTS: gl.constexpr,  # visit the tiles of the lists; else row q sees [0, min(q + 1 + offset, keys))
    ACCUMULATE: gl.constexpr,
    STAGES: gl.constexpr,
):
    head, batch = gl.program_id(1), gl.program_id(2)
    ROWS: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    lists = (full_start, full_tiles, partial_start, partial_tiles)
    entry = batch * mask_stride * gl.num_programs(0)
    if LISTS:
        tile = gl.load(longest_first + entry + gl.program_id(0))
        entry += tile
        tested, count = listed_walk(lists, entry, BLOCK_N)
        last = 0
    else:
        tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest first
        seen_by_all = gl.maximum(gl.minimum(2 * ROWS * tile + 1 + offset, keys), 0)
        count = gl.cdiv(gl.maximum(gl.minimum(2 * ROWS * (tile + 1) + offset, keys), 0), BLOCK_N)
        tested = count - seen_by_all // BLOCK_N
        last = count - 1
    walk = (tested, count, last, entry)
    place = (batch, head, head // group, tile)

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, dout_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    buffers = (q_smem, dout_smem, k_smem, v_smem)
    # k_full and v_full apart, for S can start before the values are there; both buffers are free at the same time.
    barriers = (make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2))

    at = dq + batch.to(gl.int64) * dq_stride_b + head.to(gl.int64) * dq_stride_h
    first_statistic = (batch * heads + head).to(gl.int64) * padded_rows
    statistics = (lse + first_statistic, delta + first_statistic)
    bounds = (begin, end, anchor_begin, anchor_end)
    shape = (rows, keys, offset, batch * mask_stride * rows, scale, scale_log2)
    output = (at, dq_stride_s)
    # fmt: off
    gl.warp_specialize([
        (_consumer, (0, buffers, barriers, walk, place, lists, bounds, statistics, shape, output, LISTS, ACCUMULATE, STAGES)),
        (_consumer, (1, buffers, barriers, walk, place, lists, bounds, statistics, shape, output, LISTS, ACCUMULATE, STAGES)),
        (_producer, (q_desc, k_desc, v_desc, dout_desc, buffers, barriers, walk, place, lists, LISTS, STAGES)),
    ], [4, 1], [240, 24])
    # fmt: on


@gluon.jit
def _producer(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    buffers,
    barriers,
    walk,
    place,
    lists,
    LISTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_smem, dout_smem, k_smem, v_smem = buffers
    rows_full, k_full, v_full, empty = barriers
    tested, count, last, entry = walk
    batch, head, kv_head, tile = place
    ROWS: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    mbarrier.expect(rows_full.index(0), 4 * q_desc.block_type.nbytes)
    for who in gl.static_range(2):
        box = [batch, (2 * tile + who) * ROWS, head, 0]
        tma.async_copy_global_to_shared(q_desc, box, rows_full.index(0), q_smem.index(who))
        tma.async_copy_global_to_shared(dout_desc, box, rows_full.index(0), dout_smem.index(who))
    for i in range(count):
        key = (listed_tile(lists, entry, i, tested, BLOCK_N) if LISTS else last - i) * BLOCK_N
        load_next(k_desc, k_smem, k_full, empty, i, batch, key, kv_head, STAGES)
        slot = i % STAGES
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [batch, key, kv_head, 0], v_full.index(slot), v_smem.index(slot))


@gluon.jit
def _consumer(
    who: gl.constexpr,
    buffers,
    barriers,
    walk,
    place,
    lists,
    bounds,
    statistics,
    shape,
    output,
    LISTS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_smem, dout_smem, k_smem, v_smem = buffers
    rows_full, k_full, v_full, empty = barriers
    tested, count, last, entry = walk
    batch, head, kv_head, tile = place
    lse_at, delta_at = statistics
    rows, keys, offset, mask_at, scale, scale_log2 = shape
    at, stride = output
    ROWS: gl.constexpr = q_smem.shape[2]
    DIM: gl.constexpr = q_smem.shape[4]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])

    first_row = (2 * tile + who) * ROWS
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    total = gl.zeros([ROWS, DIM], gl.float32, sum_layout)
    # A walk of no steps in a branch of its own: to merge it with a product in flight, ptxas would serialise them all.
    if count > 0:
        lse, delta = gl.load(lse_at + row), gl.load(delta_at + row)
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
        mbarrier.wait(rows_full.index(0), 0)
        q, dout = matrix(q_smem.index(who)), matrix(dout_smem.index(who))
        for i in range(count):
            slot = i % STAGES
            k, v = matrix(k_smem.index(slot)), matrix(v_smem.index(slot))
            mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), i // STAGES & 1)
            dp = warpgroup_mma(dout, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p = gl.exp2(scores * scale_log2 - lse[:, None])
            if i < tested:
                first_key = (listed_tile(lists, entry, i, tested, BLOCK_N) if LISTS else last - i) * BLOCK_N
                key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
                limits = row_limits(row, rows, keys, offset, bounds, mask_at, LISTS)
                p = gl.where(visible(key, limits, 0, LISTS), p, 0.0)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = (p * (dp - delta[:, None])).to(k_smem.dtype)
            ds = gl.convert_layout(ds, gl.DotOperandLayout(0, sum_layout, 2))
            total = warpgroup_mma_wait(0, deps=[warpgroup_mma(ds, k, total, is_async=True)])
            mbarrier.arrive(empty.index(slot), count=1)
        write_rows(at, stride, first_row, rows, total * scale, ACCUMULATE)
    elif not ACCUMULATE:
        write_rows(at, stride, first_row, rows, total, False)
