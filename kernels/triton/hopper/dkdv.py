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


@gluon.jit(do_not_specialize=["mask_stride", "lists_stride_b", "lists_stride_h", "rows", "keys", "padded_rows"])
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
    dk_base,  # what to add, in the places of dk and dv; they themselves, or others in fp32
    dv_base,
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
    lists_stride_b,  # rows of lists from one batch element to the next, and from kv head to kv head; 0 where they share
    lists_stride_h,
    rows,
    keys,
    padded_rows,
    scale,
    GROUP: gl.constexpr,
    SPARSE: gl.constexpr,  # the lists are of a sparse index
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    kv_head, batch = gl.program_id(1), gl.program_id(2)
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    tile = gl.load(longest_first + batch * mask_stride * gl.num_programs(0) + gl.program_id(0))
    entry = (batch * lists_stride_b + kv_head * lists_stride_h) * gl.num_programs(0) + tile
    lists = (full_start, full_tiles, partial_start, partial_tiles)
    tested, count = listed_walk(lists, entry, BLOCK_M)
    # Lists of a sparse index name the member of the group with each tile, so they are walked once.
    walk = (tested, count, entry, count if SPARSE else GROUP * count)

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

    dk_at = batch.to(gl.int64) * dk_stride_b + kv_head.to(gl.int64) * dk_stride_h
    dv_at = batch.to(gl.int64) * dv_stride_b + kv_head.to(gl.int64) * dv_stride_h
    bounds = (begin, end, anchor_begin, anchor_end)
    shape = (rows, keys, batch * mask_stride * rows, scale, padded_rows)
    output = (dk + dk_at, dk_base + dk_at, dk_stride_s, dv + dv_at, dv_base + dv_at, dv_stride_s)
    # fmt: off
    gl.warp_specialize([
        (_consumer, (0, k_smem, v_smem, row_buffers, keys_full, row_barriers, walk, tile, lists, bounds, shape, output, SPARSE, ACCUMULATE_DK, ACCUMULATE_DV)),
        (_consumer, (1, k_smem, v_smem, row_buffers, keys_full, row_barriers, walk, tile, lists, bounds, shape, output, SPARSE, ACCUMULATE_DK, ACCUMULATE_DV)),
        (_producer, (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, k_smem, v_smem, row_buffers, keys_full, row_barriers, walk, (batch, kv_head, tile), lists, padded_rows, GROUP, SPARSE)),
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
    SPARSE: gl.constexpr,
):
    tested, count, entry, steps = walk
    batch, kv_head, tile = place
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    descriptors = (q_desc, lse_desc, dout_desc, delta_desc)
    row_blocks = padded_rows // BLOCK_M
    if count > 0:  # else nobody waits for them, and a copy must not land after the program has ended
        load_own(k_desc, v_desc, k_smem, v_smem, keys_full, batch, tile, kv_head)
    for step in range(steps):
        block = listed_tile(lists, entry, step % count, tested, BLOCK_M)
        if SPARSE:
            member, block = block // row_blocks, block % row_blocks
        else:
            member = step // count
        head = kv_head * GROUP + member
        statistic = (batch * gl.num_programs(1) * GROUP + head) * padded_rows + block * BLOCK_M
        load_rows(descriptors, row_buffers, row_barriers, step, batch, head, block * BLOCK_M, statistic)


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
    SPARSE: gl.constexpr,
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
):
    q_smem, lse_smem, dout_smem, delta_smem = row_buffers
    q_full, dout_full, empty = row_barriers
    tested, count, entry, steps = walk
    rows, keys, mask_at, scale, padded_rows = shape
    dk_at, dk_base, dk_stride, dv_at, dv_base, dv_stride = output
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
        for done in range(steps):
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
                first_row = listed_tile(lists, entry, i, tested, BLOCK_M) * BLOCK_M
                if SPARSE:
                    first_row = first_row % padded_rows
                row = first_row + gl.arange(0, BLOCK_M, row_layout)
                key = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, score_layout))
                p = hide_weights(p, key, row, rows, bounds, mask_at, 1)
            dv = warpgroup_mma(gl.convert_layout(p.to(q_smem.dtype), operand_layout), dout, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds = (p * (dp - delta_smem.index(slot).load(row_layout)[None, :])).to(q_smem.dtype)
            dk = warpgroup_mma(gl.convert_layout(ds, operand_layout), q, dk, is_async=True)
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            mbarrier.arrive(empty.index(slot), count=1)
            i = gl.where(i + 1 == count, 0, i + 1)
        write_rows(dk_at, dk_base, dk_stride, first_key, keys, dk * scale, ACCUMULATE_DK)
        write_rows(dv_at, dv_base, dv_stride, first_key, keys, dv, ACCUMULATE_DV)
    else:
        write_rows(dk_at, dk_base, dk_stride, first_key, keys, dk, ACCUMULATE_DK)
        write_rows(dv_at, dv_base, dv_stride, first_key, keys, dv, ACCUMULATE_DV)
