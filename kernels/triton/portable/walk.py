"""What all attention kernels share: where the i-th block of a walk lies, and which elements of it are visible."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def listed_place(order, length, longest_first, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's first row or key, by the order of the tiles in row `order` of `longest_first`."""
    tile = tl.load(longest_first + order * tl.cdiv(length, TILE) + tl.program_id(0) // (TILE // BLOCK))
    return tile * TILE + tl.program_id(0) % (TILE // BLOCK) * BLOCK


@triton.jit
def listed(lists, first, length, start, tiles, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The list in which the tile of row or key `first` has its tiles, and how many blocks these are, SPLIT each."""
    entry = lists * tl.cdiv(length, TILE) + first // TILE
    begin = tl.load(start + entry)
    return tiles + begin, (tl.load(start + entry + 1) - begin).to(tl.int32) * SPLIT


@triton.jit
def row_walk(
    lists,
    order,
    rows,
    keys,
    offset,
    full_start,
    full_tiles,
    partial_start,
    partial_tiles,
    longest_first,
    TILES: tl.constexpr,
    LISTS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This program's first row, and its blocks of keys: those seen in full, and those to be tested.

    Of each kind the list, the first and one past the last; none unless TILES. `lists` is the row of lists of the
    program's head, and `order` that of its mask.
    """
    if LISTS:
        first_row = listed_place(order, rows, longest_first, TILE, BLOCK_M)
        if not TILES:
            return first_row, full_tiles, 0, 0, partial_tiles, 0, 0
        full_list, full_stop = listed(lists, first_row, rows, full_start, full_tiles, SPLIT, TILE)
        partial_list, partial_stop = listed(lists, first_row, rows, partial_start, partial_tiles, SPLIT, TILE)
        return first_row, full_list, 0, full_stop, partial_list, 0, partial_stop
    else:
        first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
        full_stop = tl.maximum(tl.minimum(first_row + 1 + offset, keys), 0) // BLOCK_N
        partial_stop = tl.cdiv(tl.minimum(tl.minimum(first_row + BLOCK_M, rows) + offset, keys), BLOCK_N)
        return first_row, full_tiles, 0, full_stop, partial_tiles, full_stop, partial_stop


@triton.jit
def key_walk(
    lists,
    first_key,
    rows,
    keys,
    offset,
    full_start,
    full_tiles,
    partial_start,
    partial_tiles,
    TILES: tl.constexpr,
    LISTS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The blocks of rows of a program's keys, as those of keys in `row_walk`."""
    if not TILES:
        return full_tiles, 0, 0, partial_tiles, 0, 0
    if LISTS:
        full_list, full_stop = listed(lists, first_key, keys, full_start, full_tiles, SPLIT, TILE)
        partial_list, partial_stop = listed(lists, first_key, keys, partial_start, partial_tiles, SPLIT, TILE)
        return full_list, 0, full_stop, partial_list, 0, partial_stop
    else:
        # The first row that sees the first key, and the first that sees all keys that exist.
        partial_first = tl.minimum(tl.maximum(first_key - offset, 0), rows) // BLOCK_M
        last_key = tl.minimum(first_key + BLOCK_N, keys) - 1
        full_first = tl.cdiv(tl.minimum(tl.maximum(last_key - offset, 0), rows), BLOCK_M)
        return full_tiles, full_first, tl.cdiv(rows, BLOCK_M), partial_tiles, partial_first, full_first


@triton.jit
def block_of(tiles, i, LISTS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """First key or row of the i-th block: block `i % SPLIT` of a tile in the list, or block i from 0 on."""
    if LISTS:
        return tl.load(tiles + i // SPLIT) * TILE + i % SPLIT * BLOCK
    else:
        return i * BLOCK


@triton.jit
def of_member(first_head, walk, row, rows, SPARSE: tl.constexpr, TILE: tl.constexpr):
    """Head and first row of a block: the lists of a sparse index count the tiles of all heads of a group on."""
    if SPARSE:
        padded = tl.cdiv(rows, TILE) * TILE
        return first_head + row // padded, row % padded
    else:
        return first_head + walk, row


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


@triton.jit
def computed(chunks, stride_b, stride_h, key_at, batch, head, row, rows, key, TILE: tl.constexpr):
    """Bool: which rows compute the tile of key `key`, by their sets of chunks (`Selection.chunks`)."""
    chunk = tl.load(key_at + key // TILE)
    words = chunks + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + (chunk // 32).to(tl.int64) * rows
    return ((tl.load(words + row, mask=row < rows, other=0) >> (chunk % 32)) & 1) != 0


@triton.jit
def row_statistics(lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, batch, head, row, rows):
    """lse to base 2 and delta of some rows; +inf, so that exp gives 0, for rows that are absent or see nothing."""
    lse_at = lse + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + row
    delta_at = delta + batch.to(tl.int64) * delta_stride_b + head.to(tl.int64) * delta_stride_h + row
    row_lse = tl.load(lse_at, mask=row < rows, other=float("inf")) * LOG2_E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    return row_lse, tl.load(delta_at, mask=row < rows, other=0.0)


@triton.jit
def write_rows(at, stride, row, rows, gradient, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Stores some rows of a gradient, or adds them to what is there. 64 bits: tensors may pass 2^31 elements."""
    column = tl.arange(0, PADDED_DIM)[None, :]
    at += row[:, None].to(tl.int64) * stride + column
    inside = (row < rows)[:, None] & (column < DIM)
    if ACCUMULATE:
        gradient += tl.load(at, mask=inside, other=0.0)
    tl.store(at, gradient.to(at.dtype.element_ty), mask=inside)
