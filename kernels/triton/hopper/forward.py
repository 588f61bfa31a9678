"""The forward kernel for Hopper: one producer warp, two or three consumer warpgroups (FlashAttention-3, arXiv:2407.08608).

The producer keeps two rings in shared memory filled with key tiles and value tiles, by TMA. Each consumer owns 64 rows
and overlaps the softmax of key tile j with the product P V of tile j - 1; the consumers take turns at issuing products,
so that one's exponentials run beside the other's. Tiles that need an element test come first, the rest have no mask
arithmetic at all. All waiting is on mbarriers: `full` ones say that a buffer was filled, `empty` ones that it was read.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from farspan.kernels.triton.hopper.common import load_next, make_barriers, matrix, row_limits, visible
from farspan.kernels.triton.hopper.schedule import key_tile, key_tiles, rounds, row_tile, task
from farspan.kernels.triton.hopper.statistics import LOG2_E
from farspan.kernels.triton.rows import merge_weights

_LN_2 = gl.constexpr(math.log(2.0))


@gluon.jit(
    do_not_specialize=[
        "rows",
        "keys",
        "offset",
        "heads",
        "group",
        "batch_heads",
        "row_tiles",
        "section",
        "mask_stride",
        "lists_stride_b",
        "lists_stride_h",
        "out_stride_b",
        "lse_stride_b",
        "lse_stride_h",
    ]
)
def forward_kernel(
    q_desc,  # [B, S, H, D]; boxes of the rows of one consumer
    k_desc,  # [B, N, Hkv, D]; boxes of one key tile
    v_desc,
    out,  # [B, S, H, D]
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse,  # [B, H, S]
    lse_stride_b,
    lse_stride_h,
    out_base,  # what to merge with, in the places of out and lse: they themselves, or others in fp32
    lse_base,
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
    keys,
    offset,
    heads,
    group,  # query heads that read one kv head
    batch_heads,
    row_tiles,
    section,  # heads whose keys and values fit in the L2 cache
    scale,
    LISTS: gl.constexpr,  # visit the tiles of the lists; else row q sees [0, min(q + 1 + offset, keys))
    ACCUMULATE: gl.constexpr,  # merge with what out_base and lse_base hold
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    buffers = (q_smem, k_smem, v_smem)
    q_full, q_empty, turns = make_barriers(CONSUMERS, 1), make_barriers(CONSUMERS, 1), make_barriers(CONSUMERS, 1)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS)
    v_full, v_empty = make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    shape = (
        rows,
        keys,
        offset,
        heads,
        group,
        batch_heads,
        row_tiles,
        section,
        mask_stride,
        lists_stride_b,
        lists_stride_h,
    )
    lists = (full_start, full_tiles, partial_start, partial_tiles, longest_first)
    bounds = (begin, end, anchor_begin, anchor_end)
    scale_log2 = scale * LOG2_E
    outputs = (out, out_base, out_stride_b, out_stride_s, out_stride_h, lse, lse_base, lse_stride_b, lse_stride_h)
    # The first entry runs in the warps that the kernel was launched with, and takes the registers that are left. The
    # arguments are spelled out each time: constants survive only in a tuple that is never assigned to a name.
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (buffers, barriers, shape, lists, bounds, outputs, scale_log2, 0, LISTS, ACCUMULATE, 2, STAGES)),
            (_consumer, (buffers, barriers, shape, lists, bounds, outputs, scale_log2, 1, LISTS, ACCUMULATE, 2, STAGES)),
            (_producer, (q_desc, k_desc, v_desc, buffers, barriers, shape, lists, LISTS, 2, STAGES)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (_consumer, (buffers, barriers, shape, lists, bounds, outputs, scale_log2, 0, LISTS, ACCUMULATE, 3, STAGES)),
            (_consumer, (buffers, barriers, shape, lists, bounds, outputs, scale_log2, 1, LISTS, ACCUMULATE, 3, STAGES)),
            (_consumer, (buffers, barriers, shape, lists, bounds, outputs, scale_log2, 2, LISTS, ACCUMULATE, 3, STAGES)),
            (_producer, (q_desc, k_desc, v_desc, buffers, barriers, shape, lists, LISTS, 3, STAGES)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    # fmt: on


@gluon.jit
def _producer(
    q_desc,
    k_desc,
    v_desc,
    buffers,
    barriers,
    shape,
    lists,
    LISTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the buffers, in the order in which the consumers read them."""
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    rows, keys, offset, heads, group, batch_heads, row_tiles, section, mask_stride, lists_stride_b, lists_stride_h = (
        shape
    )
    ROWS: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]

    k_count = 0  # tiles loaded so far: they give the ring's slot and the barrier's phase
    v_count = 0
    q_phase = 1  # new barriers count as empty
    for round in range(rounds(batch_heads * row_tiles)):
        batch, head, tile = row_tile(task(round), shape, lists, LISTS)
        found = key_tiles(batch, head, tile, shape, lists, LISTS, CONSUMERS * ROWS, BLOCK_N)
        first_value = 0
        for step in range(gl.maximum(found[1], 1)):
            first_key = key_tile(step, found, shape, lists, LISTS, BLOCK_N) * BLOCK_N
            if step == 0:
                for who in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_empty.index(who), q_phase)
                    mbarrier.expect(q_full.index(who), q_desc.block_type.nbytes)
                    box = [batch, (tile * CONSUMERS + who) * ROWS, head, 0]
                    tma.async_copy_global_to_shared(q_desc, box, q_full.index(who), q_smem.index(who))
            load_next(k_desc, k_smem, k_full, k_empty, k_count, batch, first_key, head // group, STAGES)
            k_count += 1
            # Values are wanted one step later than keys.
            if step > 0:
                load_next(v_desc, v_smem, v_full, v_empty, v_count, batch, first_value, head // group, STAGES)
                v_count += 1
            first_value = first_key
        load_next(v_desc, v_smem, v_full, v_empty, v_count, batch, first_value, head // group, STAGES)
        v_count += 1
        q_phase ^= 1


@gluon.jit
def _consumer(
    buffers,
    barriers,
    shape,
    lists,
    bounds,
    outputs,
    scale_log2,
    who: gl.constexpr,
    LISTS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Computes its 64 rows of each row tile."""
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    rows, keys, offset, heads, group, batch_heads, row_tiles, section, mask_stride, lists_stride_b, lists_stride_h = (
        shape
    )
    ROWS: gl.constexpr = q_smem.shape[2]
    DIM: gl.constexpr = q_smem.shape[4]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    count = 0  # key tiles so far
    q_phase = 0
    for round in range(rounds(batch_heads * row_tiles)):
        batch, head, tile = row_tile(task(round), shape, lists, LISTS)
        found = key_tiles(batch, head, tile, shape, lists, LISTS, CONSUMERS * ROWS, BLOCK_N)
        first_row = (tile * CONSUMERS + who) * ROWS
        row = first_row + gl.arange(0, ROWS, row_layout)
        limits = row_limits(row, rows, keys, offset, bounds, batch * mask_stride * rows, LISTS)

        # The first tile is always tested: that is right for a full one too, and saves a case.
        q = matrix(q_smem.index(who))
        mbarrier.wait(q_full.index(who), q_phase)
        first_key = key_tile(0, found, shape, lists, LISTS, BLOCK_N) * BLOCK_N
        mbarrier.wait(k_full.index(count % STAGES), count // STAGES & 1)
        scores = warpgroup_mma_wait(0, deps=(_issue_scores(q, k_smem, count, score_layout, STAGES),))
        mbarrier.arrive(k_empty.index(count % STAGES), count=1)
        scores = _hide(scores, first_key, limits, LISTS)
        highest = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        weights, shrink, highest = _softmax(scores, highest, scale_log2, True)
        total = _thread_sums(weights)
        out = gl.zeros([ROWS, DIM], gl.float32, out_layout)
        mbarrier.wait(v_full.index(count % STAGES), count // STAGES & 1)
        count += 1

        state = (out, weights, shrink, highest, total)
        tested = gl.maximum(found[0], 1)
        # fmt: off
        count, state = _steps(1, tested, count, q_phase, state, q, buffers, barriers, found, shape, lists, limits,
                              scale_log2, who, True, LISTS, CONSUMERS, STAGES, score_layout)
        count, state = _steps(tested, found[1], count, q_phase, state, q, buffers, barriers, found, shape, lists, limits,
                              scale_log2, who, False, LISTS, CONSUMERS, STAGES, score_layout)
        # fmt: on
        out, weights, shrink, highest, total = state
        mbarrier.arrive(q_empty.index(who), count=1)
        q_phase ^= 1
        out = warpgroup_mma_wait(0, deps=(_issue_output(weights, shrink, out, v_smem, count - 1, STAGES),))
        mbarrier.arrive(v_empty.index((count - 1) % STAGES), count=1)
        _store(out, highest, gl.sum(total, 1), batch, head, first_row, rows, outputs, ACCUMULATE)


@gluon.jit
def _steps(
    first,
    stop,
    count,
    turn_phase,
    state,
    q,
    buffers,
    barriers,
    found,
    shape,
    lists,
    limits,
    scale_log2,
    who: gl.constexpr,
    TESTED: gl.constexpr,
    LISTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    score_layout: gl.constexpr,
):
    """Key tiles `first .. stop` of a row tile; `count` is the number of the first in the ring.

    The state holds the weights of the tile before, which have yet to be multiplied by its values, and the factor by
    which the output of the tiles before that shrinks.
    """
    out, weights, shrink, highest, total = state
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    for step in range(first, stop):
        if TESTED:
            first_key = key_tile(step, found, shape, lists, LISTS, BLOCK_N) * BLOCK_N
        # While one consumer's products run, the others do their exponentials. `turn_phase` makes up for the first tile
        # of every row tile, which takes no turn.
        mbarrier.wait(turns.index(who), (count & 1) ^ turn_phase ^ (0 if who == 0 else 1))
        mbarrier.wait(k_full.index(count % STAGES), count // STAGES & 1)
        pending_scores = _issue_scores(q, k_smem, count, score_layout, STAGES)
        pending_out = _issue_output(weights, shrink, out, v_smem, count - 1, STAGES)
        mbarrier.arrive(turns.index((who + 1) % CONSUMERS), count=1)
        scores = warpgroup_mma_wait(1, deps=(pending_scores,))
        mbarrier.arrive(k_empty.index(count % STAGES), count=1)
        if TESTED:
            scores = _hide(scores, first_key, limits, LISTS)
        weights, shrink, highest = _softmax(scores, highest, scale_log2, TESTED)
        total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + _thread_sums(weights)
        # To wait for the values of the next product is early here, but it is a branch: without one, ptxas pulls the
        # wait below in front of the exponentials, which are to run beside the product.
        mbarrier.wait(v_full.index(count % STAGES), count // STAGES & 1)
        out = warpgroup_mma_wait(0, deps=(pending_out,))
        mbarrier.arrive(v_empty.index((count - 1) % STAGES), count=1)
        count += 1
    return count, (out, weights, shrink, highest, total)


@gluon.jit
def _issue_scores(q, k_smem, count, layout: gl.constexpr, STAGES: gl.constexpr):
    """Starts Q K^T of the key tile that is number `count` in the ring."""
    k = matrix(k_smem.index(count % STAGES))
    zero = gl.full([q.shape[0], k.shape[0]], 0.0, gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _issue_output(weights, shrink, out, v_smem, count, STAGES: gl.constexpr):
    """Starts out * shrink + P V of the value tile that is number `count` in the ring."""
    out_layout: gl.constexpr = out.type.layout
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
    p = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, out_layout, 2))
    return warpgroup_mma(p, matrix(v_smem.index(count % STAGES)), out, is_async=True)


@gluon.jit
def _hide(scores, first_key, limits, LISTS: gl.constexpr):
    """-inf where a row does not see a key."""
    key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where(visible(key, limits, 0, LISTS), scores, float("-inf"))


@gluon.jit
def _softmax(scores, highest, scale_log2, TESTED: gl.constexpr):
    """A step of the online softmax in base 2: weights, by what the output so far shrinks, the new maximum."""
    higher = gl.maximum(highest, _row_max(scores) * scale_log2)
    safe = higher
    if TESTED:  # a row that has seen nothing yet has -inf, which minus itself is NaN
        safe = gl.where(higher == float("-inf"), 0.0, higher)
    return gl.exp2(scores * scale_log2 - safe[:, None]), gl.exp2(highest - safe), higher


@gluon.jit
def _row_max(scores):
    """Maximum of each row in two levels: one chain of 32 dependent maxima would be all latency."""
    parts = gl.max(scores.reshape([scores.shape[0], 4, scores.shape[1] // 4]), 1)
    return gl.convert_layout(gl.max(parts, 1), gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def _thread_sums(weights):
    """Sums `[rows, 4]` of what each of a row's four threads holds; they are added up once, at the end."""
    # In the layout of a product a thread holds the columns 8 i + 2 t and 8 i + 2 t + 1.
    return gl.sum(gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _store(out, highest, weight, batch, head, first_row, rows, outputs, ACCUMULATE: gl.constexpr):
    """Normalises, merges with a base if asked, and writes straight from registers."""
    out_to, out_base, out_stride_b, out_stride_s, out_stride_h, lse_to, lse_base, lse_stride_b, lse_stride_h = outputs
    row_layout: gl.constexpr = gl.SliceLayout(1, out.type.layout)
    highest, weight = gl.convert_layout(highest, row_layout), gl.convert_layout(weight, row_layout)
    row = first_row + gl.arange(0, out.shape[0], row_layout)
    column = gl.arange(0, out.shape[1], gl.SliceLayout(0, out.type.layout))
    present = row < rows
    # 64 bits: a tensor may have more than 2^31 elements.
    lse_at = batch.to(gl.int64) * lse_stride_b + head.to(gl.int64) * lse_stride_h + row
    out_at = batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    out_at = out_at + ((row.to(gl.int64) * out_stride_s)[:, None] + column[None, :])

    blind = weight == 0
    weight = gl.where(blind, 1.0, weight)
    part_lse = gl.where(blind, float("-inf"), (highest + gl.log2(weight)) * _LN_2)
    part = out * (1.0 / weight)[:, None]
    if ACCUMULATE:
        old_lse = gl.load(lse_base + lse_at, mask=present, other=float("-inf"))
        merged, old_weight, part_weight = merge_weights(old_lse, part_lse)
        old = gl.load(out_base + out_at, mask=present[:, None], other=0.0)
        part = old * old_weight[:, None] + part * part_weight[:, None]
        part_lse = merged
    gl.store(lse_to + lse_at, part_lse, mask=present)
    gl.store(out_to + out_at, part.to(out_to.dtype.element_ty), mask=present[:, None])
