"""The dk/dv kernel for Hopper, for masks with lists: a program owns 128 keys and visits the row tiles that see them.

It walks once for each query head of the group, and sums. One warp loads q, dout, lse and delta into rings; two consumer
warpgroups own 64 keys each. All products are transposed, so that P^T and dS^T come out of one in the registers in which
the next one takes them: S^T = k q^T, dP^T = v dout^T, dv += P^T dout, dk += dS^T q.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from farspan.kernels.triton.hopper.common import (
    hide_weights,
    load_own,
    load_rows,
    make_barriers,
    matrix,
    wait_for,
    write_rows,
)
from farspan.kernels.triton.hopper.schedule import listed_tile, listed_walk
from farspan.kernels.triton.hopper.statistics import LOG2_E


@gluon.jit(do_not_specialize=["mask_stride", "rows", "keys", "padded_rows"])
def dkdv_kernel(
    q_desc,  # [B, S, H, D]; boxes of a row tile
    k_desc,  # [B, N, Hkv, D]; boxes of the 64 keys of a consumer
    v_desc,
    dout_desc,  # as q
    lse_desc,  # [B x H x padded S]: to base 2, +inf for rows that see nothing or are past the end
    delta_desc,  # [B x H x padded S]
    dk,  # [B, N, Hkv, D]
    dk_stride_b,
    dk_stride_s,
    dk_stride_h,
    dv,
    dv_stride_b,
    dv_stride_s,
    dv_stride_h,
    begin,  # the mask's bounds, [mask batch, S]
    end,
    anchor_begin,
    anchor_end,
    full_start,  # TileMap.by_key
    full_tiles,
    partial_start,
    partial_tiles,
    longest_first,
    mask_stride,  # 0 where the whole batch shares one mask, else 1
    rows,
    keys,
    padded_rows,
    scale,
    GROUP: gl.constexpr,
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    kv_head, batch = gl.program_id(1), gl.program_id(2)
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    entry = batch * mask_stride * gl.num_programs(0)
    tile = gl.load(longest_first + entry + gl.program_id(0))
    entry += tile
    lists = (full_start, full_tiles, partial_start, partial_tiles)
    tested, count = listed_walk(lists, entry, BLOCK_M)
    walk = (tested, count, entry)

    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, dout_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    row_buffers = (q_smem, lse_smem, dout_smem, delta_smem)
    keys_full = make_barriers(1, 1)
    # q_full and dout_full apart, for S can start before dout is there.
    row_barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2))

    dk_at = dk + batch.to(gl.int64) * dk_stride_b + kv_head.to(gl.int64) * dk_stride_h
    dv_at = dv + batch.to(gl.int64) * dv_stride_b + kv_head.to(gl.int64) * dv_stride_h
    bounds = (begin, end, anchor_begin, anchor_end)
    shape = (rows, keys, batch * mask_stride * rows, scale)
    output = (dk_at, dk_stride_s, dv_at, dv_stride_s)
    # fmt: off
    gl.warp_specialize([
        (_consumer, (0, k_smem, v_smem, row_buffers, keys_full, row_barriers, walk, tile, lists, bounds, shape, output, GROUP, ACCUMULATE_DK, ACCUMULATE_DV)),
        (_consumer, (1, k_smem, v_smem, row_buffers, keys_full, row_barriers, walk, tile, lists, bounds, shape, output, GROUP, ACCUMULATE_DK, ACCUMULATE_DV)),
        (_producer, (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, k_smem, v_smem, row_buffers, keys_full, row_barriers, walk, (batch, kv_head, tile), lists, padded_rows, GROUP)),
    ], [4, 1], [240, 24])
    # fmt: on


@gluon.jit
def _producer(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse_desc,
    delta_desc,
    k_smem,
    v_smem,
    row_buffers,
    keys_full,
    row_barriers,
    walk,
    place,
    lists,
    padded_rows,
    GROUP: gl.constexpr,
):
    tested, count, entry = walk
    batch, kv_head, tile = place
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    descriptors = (q_desc, lse_desc, dout_desc, delta_desc)
    if count > 0:  # else nobody waits for them, and a copy must not land after the program has ended
        load_own(k_desc, v_desc, k_smem, v_smem, keys_full, batch, tile, kv_head)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        first_statistic = (batch * gl.num_programs(1) * GROUP + head) * padded_rows
        for i in range(count):
            row = listed_tile(lists, entry, i, tested, BLOCK_M) * BLOCK_M
            loaded = member * count + i
            load_rows(descriptors, row_buffers, row_barriers, loaded, batch, head, row, first_statistic + row)


@gluon.jit
def _consumer(
    who: gl.constexpr,
    k_smem,
    v_smem,
    row_buffers,
    keys_full,
    row_barriers,
    walk,
    tile,
    lists,
    bounds,
    shape,
    output,
    GROUP: gl.constexpr,
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
):
    q_smem, lse_smem, dout_smem, delta_smem = row_buffers
    q_full, dout_full, empty = row_barriers
    tested, count, entry = walk
    rows, keys, mask_at, scale = shape
    dk_at, dk_stride, dv_at, dv_stride = output
    STAGES: gl.constexpr = q_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[2]
    DIM: gl.constexpr = k_smem.shape[4]
    BLOCK_M: gl.constexpr = q_smem.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)

    first_key = (2 * tile + who) * KEYS
    dk = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
    dv = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
    # A walk of no steps in a branch of its own: to merge it with products in flight, ptxas would serialise them all.
    if count > 0:
        nothing = gl.zeros([KEYS, BLOCK_M], gl.float32, score_layout)
        mbarrier.wait(keys_full.index(0), 0)
        i = 0
        for done in range(GROUP * count):
            slot = done % STAGES
            # An index that ptxas cannot see through, lest it keep every descriptor of k and v in registers.
            zero = done >> 30
            k, v = matrix(k_smem.index(who + zero)), matrix(v_smem.index(who + zero))
            q, dout = matrix(q_smem.index(slot)), matrix(dout_smem.index(slot))
            wait_for(q_full, done)
            scores = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            wait_for(dout_full, done)
            dp = warpgroup_mma(v, dout.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p = gl.exp2(scores * (scale * LOG2_E) - lse_smem.index(slot).load(row_layout)[None, :])
            if i < tested:
                row = listed_tile(lists, entry, i, tested, BLOCK_M) * BLOCK_M + gl.arange(0, BLOCK_M, row_layout)
                key = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, score_layout))
                p = hide_weights(p, key, row, rows, bounds, mask_at, 1)
            dv = warpgroup_mma(gl.convert_layout(p.to(q_smem.dtype), operand_layout), dout, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds = (p * (dp - delta_smem.index(slot).load(row_layout)[None, :])).to(q_smem.dtype)
            dk = warpgroup_mma(gl.convert_layout(ds, operand_layout), q, dk, is_async=True)
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            mbarrier.arrive(empty.index(slot), count=1)
            i = gl.where(i + 1 == count, 0, i + 1)
        write_rows(dk_at, dk_stride, first_key, keys, dk * scale, ACCUMULATE_DK)
        write_rows(dv_at, dv_stride, first_key, keys, dv, ACCUMULATE_DV)
    else:
        if not ACCUMULATE_DK:
            write_rows(dk_at, dk_stride, first_key, keys, dk, False)
        if not ACCUMULATE_DV:
            write_rows(dv_at, dv_stride, first_key, keys, dv, False)
