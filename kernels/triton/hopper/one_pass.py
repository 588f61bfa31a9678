"""The backward in one pass for Hopper, where row q sees the keys [0, min(q + 1 + offset, keys)).

A program owns 128 keys of a kv head and visits the row tiles that see them. It computes S, dP, dv and dk as `dkdv` does;
dS, which each of its two consumer warpgroups also leaves in shared memory for its 64 keys, gives dq = dS^T k, of which
each consumer computes half and adds it to sums in global memory (`sums`): five products, where two kernels need seven.

Repeatable sums. What fp32 additions give depends on their order, so all that add to a row tile take turns: key tile t
waits until t key tiles, those before it, have added. Row tiles are seen by key tiles 0 .. n, so nobody is missing.

No deadlock. Which key tile a program takes is the number that it draws when it begins, and numbers rise with key tiles.
So whoever a program waits for has begun, and the lowest number that is still at work waits for nobody.

Little waiting. All walk down from the last row, where all of them begin under a causal mask too, and visit a row tile
in all heads of the group before the next: those of a kv head follow one another through the same tiles.

Roles, and what they wait for:
    producer    (1 warp) for room in the ring of rows; loads k and v once, then q, lse, dout and delta of each step;
    consumers   (2 x 4 warps) for these, for the other's dS, and for the turn of a row tile;
    asker       (1 warp) for the turn of each step, in global memory, ahead of the consumers (`turns`);
    teller      (1 warp) for both consumers to have added; then it hands on the turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from farspan.kernels.triton.hopper.common import load_own, load_rows, make_barriers, matrix, wait_for, write_rows
from farspan.kernels.triton.hopper.statistics import LOG2_E
from farspan.kernels.triton.hopper.sums import add_half
from farspan.kernels.triton.hopper.turns import asker, teller, visited


@gluon.jit(do_not_specialize=["rows", "keys", "padded_rows", "offset"])
def one_pass_kernel(
    q_desc,  # [B, S, H, D]; boxes of a row tile
    k_desc,  # [B, N, Hkv, D]; boxes of the 64 keys of a consumer
    v_desc,
    dout_desc,  # as q
    lse_desc,  # [B x H x padded S]: to base 2, +inf for rows that see nothing or are past the end
    delta_desc,  # [B x H x padded S]
    sums,  # fp32 [B, H, row tiles, BLOCK_M x D], zeros: dq without its scale
    counters,  # int32 [1 + B x H x row tiles], zeros: programs that began; for each row tile, how many added to it
    dk,  # [B, N, Hkv, D]
    dk_stride_b,
    dk_stride_s,
    dk_stride_h,
    dv,
    dv_stride_b,
    dv_stride_s,
    dv_stride_h,
    rows,
    keys,
    padded_rows,
    offset,
    scale,
    GROUP: gl.constexpr,
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
    STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
    LAG: gl.constexpr,  # a step computes dq of the step so many before, 0 or 1: with 1, the other's dS is there by then
):
    KEYS: gl.constexpr = k_desc.block_type.shape[1]
    DIM: gl.constexpr = k_desc.block_type.shape[3]
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    number = gl.atomic_add(counters, 1, sem="relaxed")
    kv_heads, batch_kv_heads = gl.num_programs(1), gl.num_programs(1) * gl.num_programs(2)
    tile = number // batch_kv_heads
    batch, kv_head = number % batch_kv_heads // kv_heads, number % kv_heads

    row_tiles = gl.cdiv(rows, BLOCK_M)
    first = gl.minimum(gl.maximum(2 * KEYS * tile - offset, 0) // BLOCK_M, row_tiles)
    first_full = gl.minimum(gl.cdiv(gl.maximum(2 * KEYS * (tile + 1) - 1 - offset, 0), BLOCK_M), row_tiles)
    if 2 * KEYS * (tile + 1) > keys:  # keys past the last are hidden: their zeros have weights, which may be infinite
        first_full = row_tiles
    walk = (row_tiles - first, first_full, row_tiles)

    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, dout_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], q_desc.dtype)
    ds_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * DS_STAGES, KEYS, BLOCK_M], ds_layout)
    buffers = (k_smem, v_smem, ds_smem, (q_smem, lse_smem, dout_smem, delta_smem))
    # k and v are there. Both consumers are through with a step: with its rows, and with the dS and dq of LAG steps before.
    keys_full, empty = make_barriers(1, 1), make_barriers(STAGES, 2)
    # q and lse of a step are there, for S; dout and delta are, for dP.
    row_barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, 1), empty)
    # dS of a step is there: apart for the two consumers, for Triton makes all threads of a role meet between two accesses
    # to barriers of one allocation.
    ds_full = (make_barriers(DS_STAGES, 1), make_barriers(DS_STAGES, 1))
    # It is this program's turn to add dq of a step; it was handed on; both have added the last one, if it lagged behind.
    turns = (make_barriers(STAGES, 1), make_barriers(STAGES, 1), make_barriers(1, 2))
    barriers = (keys_full, row_barriers, ds_full, turns)

    dk_at = dk + batch.to(gl.int64) * dk_stride_b + kv_head.to(gl.int64) * dk_stride_h
    dv_at = dv + batch.to(gl.int64) * dv_stride_b + kv_head.to(gl.int64) * dv_stride_h
    shape = (keys, offset, scale)
    output = (dk_at, dk_stride_s, dv_at, dv_stride_s)
    first_row_tile = (batch * kv_heads + kv_head).to(gl.int64) * (GROUP * row_tiles)
    sums_at, counters_at = sums + first_row_tile * (BLOCK_M * DIM), counters + 1 + first_row_tile
    # fmt: off
    gl.warp_specialize([
        (_consumer, (0, buffers, barriers, walk, tile, shape, sums_at, output, GROUP, ACCUMULATE_DK, ACCUMULATE_DV, LAG)),
        (_consumer, (1, buffers, barriers, walk, tile, shape, sums_at, output, GROUP, ACCUMULATE_DK, ACCUMULATE_DV, LAG)),
        (_producer, (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, buffers, barriers, walk, (batch, kv_head, tile), padded_rows, GROUP)),
        (asker, (turns, walk, counters_at, tile, GROUP)),
        (teller, (turns, empty, walk, counters_at, GROUP, LAG)),
    ], [4, 1, 1, 1], [240, 24, 24, 24])
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
    padded_rows,
    GROUP: gl.constexpr,
):
    k_smem, v_smem, ds_smem, row_buffers = buffers
    keys_full, row_barriers, ds_full, turns = barriers
    count, first_full, row_tiles = walk
    batch, kv_head, tile = place
    descriptors = (q_desc, lse_desc, dout_desc, delta_desc)
    if count > 0:  # else nobody waits for them, and a copy must not land after the program has ended
        load_own(k_desc, v_desc, k_smem, v_smem, keys_full, batch, tile, kv_head)
    for step in range(GROUP * count):
        member, i = visited(step, row_tiles, GROUP)
        head, row = kv_head * GROUP + member, i * q_desc.block_type.shape[1]
        statistic = (batch * gl.num_programs(1) * GROUP + head) * padded_rows + row
        load_rows(descriptors, row_buffers, row_barriers, step, batch, head, row, statistic)


@gluon.jit
def _consumer(
    who: gl.constexpr,
    buffers,
    barriers,
    walk,
    tile,
    shape,
    sums,
    output,
    GROUP: gl.constexpr,
    ACCUMULATE_DK: gl.constexpr,
    ACCUMULATE_DV: gl.constexpr,
    LAG: gl.constexpr,
):
    k_smem, v_smem, ds_smem, row_buffers = buffers
    q_smem, lse_smem, dout_smem, delta_smem = row_buffers
    keys_full, row_barriers, ds_full, turns = barriers
    q_full, dout_full, empty = row_barriers
    my_turn, told, last_added = turns
    count, first_full, row_tiles = walk
    keys, offset, scale = shape
    dk_at, dk_stride, dv_at, dv_stride = output
    STAGES: gl.constexpr = q_smem.shape[0]
    DS_STAGES: gl.constexpr = ds_smem.shape[0] // 2
    KEYS: gl.constexpr = k_smem.shape[2]
    DIM: gl.constexpr = k_smem.shape[4]
    BLOCK_M: gl.constexpr = q_smem.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)

    first_key = (2 * tile + who) * KEYS
    steps = GROUP * count
    dk = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
    dv = gl.zeros([KEYS, DIM], gl.float32, sum_layout)
    # A walk of no steps in a branch of its own: to merge it with products in flight, ptxas would serialise them all.
    if count > 0:
        nothing = gl.zeros([KEYS, BLOCK_M], gl.float32, score_layout)
        mbarrier.wait(keys_full.index(0), 0)
        for step in range(steps):
            slot, ds_slot = step % STAGES, step % DS_STAGES
            member, i = visited(step, row_tiles, GROUP)
            # An index that ptxas cannot see through, lest it keep every descriptor of k and v in registers.
            zero = step >> 30
            k, v = matrix(k_smem.index(who + zero)), matrix(v_smem.index(who + zero))
            q, dout = matrix(q_smem.index(slot)), matrix(dout_smem.index(slot))
            wait_for(q_full, step)
            scores = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            wait_for(dout_full, step)
            dp = warpgroup_mma(v, dout.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p = gl.exp2(scores * (scale * LOG2_E) - lse_smem.index(slot).load(row_layout)[None, :])
            if i < first_full:
                row = i * BLOCK_M + gl.arange(0, BLOCK_M, row_layout)
                key = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, score_layout))
                first_row = gl.where(key < keys, key - offset, 0x7FFFFFFF)
                p = gl.where(first_row[:, None] <= row[None, :], p, 0.0)
            dv = warpgroup_mma(gl.convert_layout(p.to(q_smem.dtype), operand_layout), dout, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds = (p * (dp - delta_smem.index(slot).load(row_layout)[None, :])).to(q_smem.dtype)
            # This buffer held dS of DS_STAGES steps before, which both have read LAG steps later.
            freed = step - DS_STAGES + LAG
            if freed >= 0:
                wait_for(empty, freed)
            ds_smem.index(2 * ds_slot + who).store(ds)
            fence_async_shared()
            _arrive(who, ds_full, ds_slot)
            dk = warpgroup_mma(gl.convert_layout(ds, operand_layout), q, dk, is_async=True)
            # Two rounds of the ring later, so that the number is not negative. With LAG 1 the first step multiplies what
            # happens to lie there, and forgets it: a branch around the product would make ptxas serialise them all.
            dq = _start_dq(who, k_smem, ds_smem, ds_full, step - LAG + 2 * DS_STAGES, zero)
            dv, dk, dq = warpgroup_mma_wait(0, deps=[dv, dk, dq])
            if step >= LAG:
                _add_dq(who, dq, sums, my_turn, step - LAG, row_tiles, BLOCK_M * DIM, GROUP)
            mbarrier.arrive(empty.index(slot), count=1)
        if LAG == 1:
            dq = warpgroup_mma_wait(0, deps=[_start_dq(who, k_smem, ds_smem, ds_full, steps - 1, 0)])
            _add_dq(who, dq, sums, my_turn, steps - 1, row_tiles, BLOCK_M * DIM, GROUP)
            mbarrier.arrive(last_added.index(0), count=1)
        write_rows(dk_at, dk_at, dk_stride, first_key, keys, dk * scale, ACCUMULATE_DK)
        write_rows(dv_at, dv_at, dv_stride, first_key, keys, dv, ACCUMULATE_DV)
    else:
        if not ACCUMULATE_DK:
            write_rows(dk_at, dk_at, dk_stride, first_key, keys, dk, False)
        if not ACCUMULATE_DV:
            write_rows(dv_at, dv_at, dv_stride, first_key, keys, dv, False)


@gluon.jit
def _arrive(who: gl.constexpr, barriers, slot):
    mbarrier.arrive(barriers[who].index(slot), count=1)


@gluon.jit
def _start_dq(who: gl.constexpr, k_smem, ds_smem, ds_full, step, zero):
    """Starts a consumer's half of dS^T k: over its own keys, then, once their dS is there, over those of the other."""
    # Half of the rows, or where these are but 64, of the columns.
    COLUMNS: gl.constexpr = k_smem.shape[4] * ds_smem.shape[2] // 128
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    dq = gl.zeros([64, COLUMNS], gl.float32, layout)
    dq = _multiply_ds(who, who, False, k_smem, ds_smem, ds_full, step, zero, dq)
    return _multiply_ds(who, 1 - who, True, k_smem, ds_smem, ds_full, step, zero, dq)


@gluon.jit
def _multiply_ds(who: gl.constexpr, keys_of: gl.constexpr, ADD: gl.constexpr, k_smem, ds_smem, ds_full, step, zero, dq):
    wait_for(ds_full[keys_of], step)
    ds = ds_smem.index(2 * (step % (ds_smem.shape[0] // 2)) + keys_of)
    k = matrix(k_smem.index(keys_of + zero))
    if ds.shape[1] == 128:
        ds = ds.slice(who * 64, 64, dim=1)
    else:
        HALF: gl.constexpr = k.shape[1] // 2
        k = k.slice(who * HALF, HALF, dim=1)
    return warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=ADD, is_async=True)


@gluon.jit
def _add_dq(who: gl.constexpr, dq, sums, my_turn, step, row_tiles, SIZE: gl.constexpr, GROUP: gl.constexpr):
    wait_for(my_turn, step)
    member, i = visited(step, row_tiles, GROUP)
    add_half(sums + (member * row_tiles + i).to(gl.int64) * SIZE + who * (SIZE // 2), dq)
