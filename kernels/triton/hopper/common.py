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
def load_next(desc, smem, full, empty, count, batch, row, head, STAGES: gl.constexpr):
    """Copies box number `count` of a ring, once its buffer was read: the number gives slot and phase."""
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, row, head, 0], full.index(slot), smem.index(slot))


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
def write_rows(at, stride, first_row, rows, value, ACCUMULATE: gl.constexpr):
    """Stores rows of a gradient from registers, or adds them to what is there; 64 bits for tensors past 2^31 elements."""
    layout: gl.constexpr = value.type.layout
    row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    at = at + ((row.to(gl.int64) * stride)[:, None] + column[None, :])
    inside = (row < rows)[:, None]
    if ACCUMULATE:
        value += gl.load(at, mask=inside, other=0.0)
    gl.store(at, value.to(at.dtype.element_ty), mask=inside)
