"""What all attention kernels share: where the i-th block of a walk lies, and which elements of it are visible."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of(tiles, i, LISTS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """First key or row of the i-th block: block `i % SPLIT` of a tile in the list, or block i from 0 on."""
    if LISTS:
        return tl.load(tiles + i // SPLIT) * TILE + i % SPLIT * BLOCK
    else:
        return i * BLOCK


@triton.jit
def row_bounds(row, rows, keys, offset, begin, end, anchor_begin, anchor_end, mask_at, LISTS: tl.constexpr):
    """The keys that each row sees, as two half-open intervals; rows past the last see none."""
    present = row < rows
    if LISTS:
        at = mask_at + row
        return (
            tl.load(begin + at, mask=present, other=0),
            tl.load(end + at, mask=present, other=0),
            tl.load(anchor_begin + at, mask=present, other=0),
            tl.load(anchor_end + at, mask=present, other=0),
        )
    else:
        nothing = row * 0
        return nothing, tl.where(present, tl.minimum(row + 1 + offset, keys), 0), nothing, nothing


@triton.jit
def visible(key, bounds, ROW_AXIS: tl.constexpr):
    """Whether each row sees each key: bool `[rows, keys]` or, with ROW_AXIS 1, `[keys, rows]`."""
    x = tl.expand_dims(key, ROW_AXIS)
    begin, end, anchor_begin, anchor_end = bounds
    main = (x >= tl.expand_dims(begin, 1 - ROW_AXIS)) & (x < tl.expand_dims(end, 1 - ROW_AXIS))
    anchor = (x >= tl.expand_dims(anchor_begin, 1 - ROW_AXIS)) & (x < tl.expand_dims(anchor_end, 1 - ROW_AXIS))
    return main | anchor
