"""What the Hopper kernels share: shapes in shared memory, rings of buffers, visibility."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def matrix(tile):
    """`[1, rows, 1, D]`, the box that TMA copies, as a matrix."""
    return tile.reshape([tile.shape[1], tile.shape[3]])


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """`COUNT` barriers, each of which completes a phase when `ARRIVALS` have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def wait_for(barriers, number):
    """Waits until what happens again and again at a ring of barriers has happened time `number`, which starts at 0."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(number % STAGES), number // STAGES & 1)


@gluon.jit
def wait_for_room(barriers, number):
    """Waits until `number`, too, fits into a ring: at once in the first round, then for the one a round before."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(number % STAGES), (number // STAGES & 1) ^ 1)


@gluon.jit
def load_next(desc, smem, full, empty, count, batch, row, head, STAGES: gl.constexpr):
    """Copies box number `count` of a ring, once its buffer was read."""
    slot = count % STAGES
    wait_for_room(empty, count)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, row, head, 0], full.index(slot), smem.index(slot))


@gluon.jit
def load_own(a_desc, b_desc, a_smem, b_smem, full, batch, tile, head):
    """Copies the tile of two tensors that a program owns: a box for each of its two consumers."""
    mbarrier.expect(full.index(0), 4 * a_desc.block_type.nbytes)
    for who in gl.static_range(2):
        box = [batch, (2 * tile + who) * a_desc.block_type.shape[1], head, 0]
        tma.async_copy_global_to_shared(a_desc, box, full.index(0), a_smem.index(who))
        tma.async_copy_global_to_shared(b_desc, box, full.index(0), b_smem.index(who))


@gluon.jit
def load_rows(descriptors, buffers, barriers, count, batch, head, row, statistic):
    """Copies rows number `count` of a ring: q and lse, for which S waits, then dout and delta, once all were read."""
    q_desc, lse_desc, dout_desc, delta_desc = descriptors
    q_smem, lse_smem, dout_smem, delta_smem = buffers
    q_full, dout_full, empty = barriers
    slot = count % q_smem.shape[0]
    wait_for_room(empty, count)
    full = q_full.index(slot)
    mbarrier.expect(full, q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [batch, row, head, 0], full, q_smem.index(slot))
    tma.async_copy_global_to_shared(lse_desc, [statistic], full, lse_smem.index(slot))
    full = dout_full.index(slot)
    mbarrier.expect(full, dout_desc.block_type.nbytes + delta_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(dout_desc, [batch, row, head, 0], full, dout_smem.index(slot))
    tma.async_copy_global_to_shared(delta_desc, [statistic], full, delta_smem.index(slot))


@gluon.jit
def row_limits(row, rows, keys, offset, bounds, mask_at, LISTS: gl.constexpr):
    """Which keys each row sees: the mask's four bounds, or the end alone where the mask needs no lists."""
    if LISTS:
        begin, end, anchor_begin, anchor_end = bounds
        return (
            gl.load(begin + mask_at + row, mask=row < rows, other=0),
            gl.load(end + mask_at + row, mask=row < rows, other=0),
            gl.load(anchor_begin + mask_at + row, mask=row < rows, other=0),
            gl.load(anchor_end + mask_at + row, mask=row < rows, other=0),
        )
    else:
        return (gl.minimum(row + 1 + offset, keys),)


@gluon.jit
def visible(key, limits, ROW_AXIS: gl.constexpr, LISTS: gl.constexpr):
    """Whether each row sees each key: bool `[rows, keys]` or, with ROW_AXIS 1, `[keys, rows]`."""
    x = gl.expand_dims(key, ROW_AXIS)
    if LISTS:
        begin, end, anchor_begin, anchor_end = limits
        main = (x >= gl.expand_dims(begin, 1 - ROW_AXIS)) & (x < gl.expand_dims(end, 1 - ROW_AXIS))
        first, stop = gl.expand_dims(anchor_begin, 1 - ROW_AXIS), gl.expand_dims(anchor_end, 1 - ROW_AXIS)
        return main | ((x >= first) & (x < stop))
    else:
        return x < gl.expand_dims(limits[0], 1 - ROW_AXIS)


@gluon.jit
def hide_weights(weights, key, row, rows, bounds, mask_at, ROW_AXIS: gl.constexpr):
    """Weights, which are >= 0, with zeros where a row does not see a key by the mask's four bounds.

    What one of a row's two intervals shows becomes negative: so the bounds of one at a time are in registers, of which
    the backward kernels have none to spare.
    """
    begin, end, anchor_begin, anchor_end = bounds
    weights = _mark(weights, key, row, rows, begin, end, mask_at, ROW_AXIS)
    if rows > 0:  # always, but the compiler does not know: it would load the bounds of both together
        weights = _mark(weights, key, row, rows, anchor_begin, anchor_end, mask_at, ROW_AXIS)
    return gl.maximum(-weights, 0.0)


@gluon.jit
def _mark(weights, key, row, rows, first, stop, mask_at, ROW_AXIS: gl.constexpr):
    first = gl.expand_dims(gl.load(first + (mask_at + row), mask=row < rows, other=0), 1 - ROW_AXIS)
    stop = gl.expand_dims(gl.load(stop + (mask_at + row), mask=row < rows, other=0), 1 - ROW_AXIS)
    x = gl.expand_dims(key, ROW_AXIS)
    return gl.where((x >= first) & (x < stop), -gl.abs(weights), weights)


@gluon.jit
def write_rows(at, base, stride, first_row, rows, value, ACCUMULATE: gl.constexpr):
    """Stores rows of a gradient from registers, plus those of `base` if asked; 64 bits for more than 2^31 elements."""
    layout: gl.constexpr = value.type.layout
    row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    place = (row.to(gl.int64) * stride)[:, None] + column[None, :]
    inside = (row < rows)[:, None]
    if ACCUMULATE:
        value += gl.load(base + place, mask=inside, other=0.0)
    gl.store(at + place, value.to(at.dtype.element_ty), mask=inside)
