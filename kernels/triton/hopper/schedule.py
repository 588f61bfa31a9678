"""Which tiles a program computes and which it walks over: all its warps ask here, so that they agree."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from farspan.kernels.tiles import TILE

_TILE = gl.constexpr(TILE)


@gluon.jit
def rounds(n_tasks):
    """How many row tiles this program computes."""
    whole = n_tasks // gl.num_programs(0)
    return whole + (task(whole) < n_tasks).to(gl.int32)


@gluon.jit
def task(round):
    """This program's task of a round. Tasks come longest first, so every other round runs backwards, for balance."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    return round * programs + gl.where(round % 2 == 0, me, programs - 1 - me)


@gluon.jit
def row_tile(number, shape, lists, LISTS: gl.constexpr):
    """Task number -> batch, head, row tile.

    Heads come in sections whose keys and values fit in the L2 cache. Within a section the longest row tile of every
    head goes first, which under a causal mask is the last one, and heads that share keys are neighbours.
    """
    rows, keys, offset, heads, group, batch_heads, row_tiles, section, mask_stride, lists_stride_b, lists_stride_h = (
        shape
    )
    section_tasks = section * row_tiles
    first = number // section_tasks * section
    within = number % section_tasks
    width = gl.minimum(section, batch_heads - first)
    batch, head = (first + within % width) // heads, (first + within % width) % heads
    tile = row_tiles - 1 - within // width
    if LISTS:
        full_start, full_tiles, partial_start, partial_tiles, longest_first = lists
        tile = gl.load(longest_first + batch * mask_stride * row_tiles + within // width)
    return batch, head, tile


@gluon.jit
def key_tiles(batch, head, tile, shape, lists, LISTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of a row tile: how many partial tiles, how many in all, and where its lists of partial and full ones begin."""
    rows, keys, offset, heads, group, batch_heads, row_tiles, section, mask_stride, lists_stride_b, lists_stride_h = (
        shape
    )
    partial_at = 0
    full_at = 0
    if LISTS:
        full_start, full_tiles, partial_start, partial_tiles, longest_first = lists
        entry = (batch * lists_stride_b + head * lists_stride_h) * row_tiles + tile
        partial_at, full_at = gl.load(partial_start + entry), gl.load(full_start + entry)
        n_partial = (gl.load(partial_start + entry + 1) - partial_at).to(gl.int32)
        n_tiles = n_partial + (gl.load(full_start + entry + 1) - full_at).to(gl.int32)
    else:
        first = tile * BLOCK_M
        seen_by_first = gl.minimum(gl.maximum(first + 1 + offset, 0), keys)
        seen_by_last = gl.minimum(gl.maximum(gl.minimum(first + BLOCK_M, rows) + offset, 0), keys)
        n_tiles = gl.cdiv(seen_by_last, BLOCK_N)
        n_partial = n_tiles - seen_by_first // BLOCK_N
    return n_partial, n_tiles, partial_at, full_at


@gluon.jit
def key_tile(step, found, shape, lists, LISTS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Number of the key tile at a step: partial tiles first, then full ones.

    Step 0 exists also for rows that see nothing, so that no loop needs an empty case: it then gets a tile past the
    last key, of which every element is masked.
    """
    n_partial, n_tiles, partial_at, full_at = found
    if LISTS:
        full_start, full_tiles, partial_start, partial_tiles, longest_first = lists
        partial = step < n_partial
        place = gl.where(partial, partial_at + step, full_at + step - n_partial)
        listed = gl.load(gl.where(partial, partial_tiles, full_tiles) + place, mask=step < n_tiles, other=0)
        return gl.where(step < n_tiles, listed, gl.cdiv(shape[1], BLOCK_N))
    else:
        return gl.maximum(n_tiles - 1 - step, 0)


@gluon.jit
def listed_walk(lists, entry, BLOCK: gl.constexpr):
    """Of a list entry: how many blocks are tested, which come first, and how many there are; a tile is TILE / BLOCK."""
    full_start, full_tiles, partial_start, partial_tiles = lists
    tested = gl.load(partial_start + entry + 1) - gl.load(partial_start + entry)
    full = gl.load(full_start + entry + 1) - gl.load(full_start + entry)
    return tested.to(gl.int32) * (_TILE // BLOCK), (tested + full).to(gl.int32) * (_TILE // BLOCK)


@gluon.jit
def listed_tile(lists, entry, i, tested, BLOCK: gl.constexpr):
    """Number of the i-th block of a walk over lists."""
    full_start, full_tiles, partial_start, partial_tiles = lists
    if i < tested:
        tile = gl.load(partial_tiles + gl.load(partial_start + entry) + i // (_TILE // BLOCK))
    else:
        tile = gl.load(full_tiles + gl.load(full_start + entry) + (i - tested) // (_TILE // BLOCK))
    return tile * (_TILE // BLOCK) + i % (_TILE // BLOCK)
