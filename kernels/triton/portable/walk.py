"""What all attention kernels share: where the i-th block of a walk lies, and which elements of it are visible."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def listed_walk(
    batch,
    length,
    full_start,
    partial_start,
    longest_first,
    mask_stride,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's first row or key, and its blocks in the lists: full ones `[first, stop)`, then partial ones.

    `length` and BLOCK are those of the side that programs divide; a tile of the other side is SPLIT blocks.
    """
    place = batch * mask_stride * tl.cdiv(length, TILE)
    tile = tl.load(longest_first + place + tl.program_id(0) // (TILE // BLOCK))
    first = tile * TILE + tl.program_id(0) % (TILE // BLOCK) * BLOCK
    full_first, full_stop = tl.load(full_start + place + tile), tl.load(full_start + place + tile + 1)
    partial_first, partial_stop = tl.load(partial_start + place + tile), tl.load(partial_start + place + tile + 1)
    return first, full_first * SPLIT, full_stop * SPLIT, partial_first * SPLIT, partial_stop * SPLIT


@triton.jit
def row_walk(
    batch,
    rows,
    keys,
    offset,
    full_start,
    partial_start,
    longest_first,
    mask_stride,
    LISTS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This program's first row, and its blocks of keys: those seen in full `[first, stop)`, and those to be tested."""
    if LISTS:
        return listed_walk(batch, rows, full_start, partial_start, longest_first, mask_stride, SPLIT, TILE, BLOCK_M)
    else:
        first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
        full_first = 0
        full_stop = tl.maximum(tl.minimum(first_row + 1 + offset, keys), 0) // BLOCK_N
        partial_first = full_stop
        partial_stop = tl.cdiv(tl.minimum(tl.minimum(first_row + BLOCK_M, rows) + offset, keys), BLOCK_N)
        return first_row, full_first, full_stop, partial_first, partial_stop


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
