"""The dk/dv kernel for Hopper: a program owns 128 keys of a kv head and walks over the tiles of rows that see them.

It walks once for each query head of the group, and sums. One warp loads q, dout, lse and delta into rings; two consumer
warpgroups own 64 keys each. All products are transposed, so that P^T and dS^T come out of one in the registers in which
the next one takes them: S^T = k q^T, dP^T = v dout^T, dv += P^T dout, dk += dS^T q.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from farspan.kernels.triton.hopper.common import make_barriers, matrix, row_limits, visible, write_rows
from farspan.kernels.triton.hopper.schedule import listed_tile, listed_walk


@gluon.jit(do_not_specialize=["mask_stride", "rows", "keys", "padded_rows", "heads", "offset"])
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
    heads,
    offset,
    scale,
    scale_log2,
    GROUP: gl.constexpr,
    LISTS: gl.constexpr,  # visit the tiles of the lists; else row q sees [0, min(q + 1 + offset, keys))
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    kv_head, batch = gl.program_id(1), gl.program_id(2)
    KEYS: gl.constexpr = k_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    lists = (full_start, full_tiles, partial_start, partial_tiles)
    entry = batch * mask_stride * gl.num_programs(0)
    if LISTS:
        tile = gl.load(longest_first + entry + gl.program_id(0))
        entry += tile
        tested, count = listed_walk(lists, entry, BLOCK_M)
        first = 0
    else:
        tile = gl.program_id(0)
        row_tiles = gl.cdiv(rows, BLOCK_M)
        first = gl.minimum(gl.maximum(2 * KEYS * tile - offset, 0) // BLOCK_M, row_tiles)
        first_full = gl.cdiv(gl.maximum(2 * KEYS * (tile + 1) - 1 - offset, 0), BLOCK_M)
        count = row_tiles - first
        tested = gl.minimum(first_full, row_tiles) - first
    walk = (tested, count, first, entry)
    place = (batch, kv_head, tile, heads, padded_rows)

    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, dout_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    buffers = (k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem)
    barriers = (make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2))

    dk_at = dk + batch.to(gl.int64) * dk_stride_b + kv_head.to(gl.int64) * dk_stride_h
    dv_at = dv + batch.to(gl.int64) * dv_stride_b + kv_head.to(gl.int64) * dv_stride_h
    bounds = (begin, end, anchor_begin, anchor_end)
    shape = (rows, keys, offset, batch * mask_stride * rows, scale, scale_log2)
    output = (dk_at, dk_stride_s, dv_at, dv_stride_s)
    # fmt: off
    gl.warp_specialize([
        (_consumer, (0, buffers, barriers, walk, tile, lists, bounds, shape, output, GROUP, LISTS, ACCUMULATE_DK, ACCUMULATE_DV, STAGES)),
        (_consumer, (1, buffers, barriers, walk, tile, lists, bounds, shape, output, GROUP, LISTS, ACCUMULATE_DK, ACCUMULATE_DV, STAGES)),
        (_producer, (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, buffers, barriers, walk, place, lists, GROUP, LISTS, STAGES)),
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
    buffers,
    barriers,
    walk,
    place,
    lists,
    GROUP: gl.constexpr,
    LISTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = buffers
    keys_full, q_full, dout_full, empty = barriers
    tested, count, first, entry = walk
    batch, kv_head, tile, heads, padded_rows = place
    KEYS: gl.constexpr = k_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    mbarrier.expect(keys_full.index(0), 4 * k_desc.block_type.nbytes)
    for who in gl.static_range(2):
        box = [batch, (2 * tile + who) * KEYS, kv_head, 0]
        tma.async_copy_global_to_shared(k_desc, box, keys_full.index(0), k_smem.index(who))
        tma.async_copy_global_to_shared(v_desc, box, keys_full.index(0), v_smem.index(who))
    loaded = 0
    for member in range(GROUP):
        head = kv_head * GROUP + member
        first_statistic = (batch * heads + head) * padded_rows
        for i in range(count):
            row = (listed_tile(lists, entry, i, tested, BLOCK_M) if LISTS else first + i) * BLOCK_M
            slot = loaded % STAGES
            mbarrier.wait(empty.index(slot), (loaded // STAGES & 1) ^ 1)
            full = q_full.index(slot)
            mbarrier.expect(full, q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [batch, row, head, 0], full, q_smem.index(slot))
            tma.async_copy_global_to_shared(lse_desc, [first_statistic + row], full, lse_smem.index(slot))
            full = dout_full.index(slot)
            mbarrier.expect(full, dout_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(dout_desc, [batch, row, head, 0], full, dout_smem.index(slot))
            tma.async_copy_global_to_shared(delta_desc, [first_statistic + row], full, delta_smem.index(slot))
            loaded += 1


@gluon.jit
def _consumer(
    who: gl.constexpr,
    buffers,
    barriers,
    walk,
    tile,
    lists,
    bounds,
    shape,
    output,
    GROUP: gl.constexpr,
    LISTS: gl.constexpr,
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = buffers
    keys_full, q_full, dout_full, empty = barriers
    tested, count, first, entry = walk
    rows, keys, offset, mask_at, scale, scale_log2 = shape
    dk_at, dk_stride, dv_at, dv_stride = output
    KEYS: gl.constexpr = k_smem.shape[2]
    DIM: gl.constexpr = k_smem.shape[4]
    BLOCK_M: gl.constexpr = q_smem.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)

    first_key = (2 * tile + who) * KEYS
    key = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, score_layout))
    # A walk of no steps in a branch of its own: to merge it with products in flight, ptxas would serialise them all.
    if count > 0:
        dk = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
        dv = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
        nothing = gl.zeros([KEYS, BLOCK_M], gl.float32, score_layout)
        mbarrier.wait(keys_full.index(0), 0)
        k, v = matrix(k_smem.index(who)), matrix(v_smem.index(who))
        i = 0
        for done in range(GROUP * count):
            slot = done % STAGES
            phase = done // STAGES & 1
            q, dout = matrix(q_smem.index(slot)), matrix(dout_smem.index(slot))
            mbarrier.wait(q_full.index(slot), phase)
            scores = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(dout_full.index(slot), phase)
            dp = warpgroup_mma(v, dout.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p = gl.exp2(scores * scale_log2 - lse_smem.index(slot).load(row_layout)[None, :])
            if i < tested:
                first_row = (listed_tile(lists, entry, i, tested, BLOCK_M) if LISTS else first + i) * BLOCK_M
                row = first_row + gl.arange(0, BLOCK_M, row_layout)
                # Keys past the last may count: what they sum up to is never written.
                if LISTS:
                    limits = row_limits(row, rows, keys, offset, bounds, mask_at, LISTS)
                    p = gl.where(visible(key, limits, 1, LISTS), p, 0.0)
                else:
                    p = gl.where(key[:, None] - offset <= row[None, :], p, 0.0)
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
        zero = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
        if not ACCUMULATE_DK:
            write_rows(dk_at, dk_stride, first_key, keys, zero, False)
        if not ACCUMULATE_DV:
            write_rows(dv_at, dv_stride, first_key, keys, zero, False)
