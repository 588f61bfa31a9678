"""The dq kernel for Hopper, for masks with lists: a program owns 128 rows of a head and visits the key tiles they see.

One warp loads keys and values into rings; two consumer warpgroups own 64 rows each and run freely against each other,
so that the exponentials of one overlap the products of the other. Three products a tile: S = q k^T, dP = dout v^T,
dq += dS k, where dS goes from registers straight into the last one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from farspan.kernels.triton.hopper.common import (
    hide_weights,
    load_next,
    load_own,
    make_barriers,
    matrix,
    wait_for,
    write_rows,
)
from farspan.kernels.triton.hopper.schedule import listed_tile, listed_walk
from farspan.kernels.triton.hopper.statistics import LOG2_E


@gluon.jit(do_not_specialize=["mask_stride", "lists_stride_b", "lists_stride_h", "rows", "padded_rows", "group"])
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
    dq_base,  # what to add, in the places of dq: itself, or another in fp32
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
    rows,
    padded_rows,
    group,
    scale,
    ACCUMULATE: gl.constexpr,
    STAGES: gl.constexpr,
):
    head, batch = gl.program_id(1), gl.program_id(2)
    tile = gl.load(longest_first + batch * mask_stride * gl.num_programs(0) + gl.program_id(0))
    entry = (batch * lists_stride_b + head * lists_stride_h) * gl.num_programs(0) + tile
    lists = (full_start, full_tiles, partial_start, partial_tiles)
    tested, count = listed_walk(lists, entry, k_desc.block_type.shape[1])
    walk = (tested, count, entry)
    place = (batch, head, head // group, tile)

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, dout_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    buffers = (q_smem, dout_smem, k_smem, v_smem)
    # k_full and v_full apart, for S can start before the values are there; both buffers are free at the same time.
    barriers = (make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2))

    at = batch.to(gl.int64) * dq_stride_b + head.to(gl.int64) * dq_stride_h
    first_statistic = (batch * gl.num_programs(1) + head).to(gl.int64) * padded_rows
    statistics = (lse + first_statistic, delta + first_statistic)
    bounds = (begin, end, anchor_begin, anchor_end)
    shape = (rows, batch * mask_stride * rows, scale)
    output = (dq + at, dq_base + at, dq_stride_s)
    # fmt: off
    gl.warp_specialize([
        (_consumer, (0, buffers, barriers, walk, tile, lists, bounds, statistics, shape, output, ACCUMULATE)),
        (_consumer, (1, buffers, barriers, walk, tile, lists, bounds, statistics, shape, output, ACCUMULATE)),
        (_producer, (q_desc, k_desc, v_desc, dout_desc, buffers, barriers, walk, place, lists, STAGES)),
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
    STAGES: gl.constexpr,
):
    q_smem, dout_smem, k_smem, v_smem = buffers
    rows_full, k_full, v_full, empty = barriers
    tested, count, entry = walk
    batch, head, kv_head, tile = place
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    if count > 0:  # else nobody waits for them, and a copy must not land after the program has ended
        load_own(q_desc, dout_desc, q_smem, dout_smem, rows_full, batch, tile, head)
    for i in range(count):
        key = listed_tile(lists, entry, i, tested, BLOCK_N) * BLOCK_N
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
    tile,
    lists,
    bounds,
    statistics,
    shape,
    output,
    ACCUMULATE: gl.constexpr,
):
    q_smem, dout_smem, k_smem, v_smem = buffers
    rows_full, k_full, v_full, empty = barriers
    tested, count, entry = walk
    lse_at, delta_at = statistics
    rows, mask_at, scale = shape
    at, base, stride = output
    STAGES: gl.constexpr = k_smem.shape[0]
    ROWS: gl.constexpr = q_smem.shape[2]
    DIM: gl.constexpr = q_smem.shape[4]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])

    first_row = (2 * tile + who) * ROWS
    row = gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    total = gl.zeros([ROWS, DIM], gl.float32, sum_layout)
    # A walk of no steps in a branch of its own: to merge it with a product in flight, ptxas would serialise them all.
    if count > 0:
        lse, delta = gl.load(lse_at + first_row + row), gl.load(delta_at + first_row + row)
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
        mbarrier.wait(rows_full.index(0), 0)
        for i in range(count):
            slot = i % STAGES
            # An index that ptxas cannot see through, lest it keep every descriptor of q and dout in registers.
            zero = i >> 30
            q, dout = matrix(q_smem.index(who + zero)), matrix(dout_smem.index(who + zero))
            k, v = matrix(k_smem.index(slot)), matrix(v_smem.index(slot))
            wait_for(k_full, i)
            scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            wait_for(v_full, i)
            dp = warpgroup_mma(dout, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p = gl.exp2(scores * (scale * LOG2_E) - lse[:, None])
            if i < tested:
                first_key = listed_tile(lists, entry, i, tested, BLOCK_N) * BLOCK_N
                key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
                p = hide_weights(p, key, first_row + zero + row, rows, bounds, mask_at, 0)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = (p * (dp - delta[:, None])).to(k_smem.dtype)
            ds = gl.convert_layout(ds, gl.DotOperandLayout(0, sum_layout, 2))
            total = warpgroup_mma_wait(0, deps=[warpgroup_mma(ds, k, total, is_async=True)])
            mbarrier.arrive(empty.index(slot), count=1)
        write_rows(at, base, stride, first_row, rows, total * scale, ACCUMULATE)
    else:
        write_rows(at, base, stride, first_row, rows, total, ACCUMULATE)
