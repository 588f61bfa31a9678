"""The kernels that list what a sparse index selects: tiles for each head, and single columns."""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.tiles import Kind

_FULL, _PARTIAL = tl.constexpr(int(Kind.FULL)), tl.constexpr(int(Kind.PARTIAL))


@triton.jit
def tiles_kernel(
    table,  # Selection.table, [B or 1, H, places]
    table_stride_b,
    table_stride_h,
    places,
    own_at,  # [own]: row_at or key_at
    other_at,  # [other]
    kinds,  # [mask batch, row tiles, key tiles]
    starts,  # [1 + 2 x lists]: where each list begins, first those of full tiles; WRITE reads it
    counts,  # the same, where the length of each list goes behind a zero, unless WRITE
    tiles,  # the lists one after the other, which WRITE fills
    own,  # tiles of the side whose lists these are
    other,  # tiles of the other side
    own_stride,
    other_stride,
    mask_stride,
    GROUP: tl.constexpr,  # heads that share their lists: a number is `member x other + tile`
    WRITE: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """The lists of some tiles of one side: a walk over the other side's, with a running count for each list."""
    batch, line = tl.program_id(2), tl.program_id(1)
    mine = tl.program_id(0) * OWN + tl.arange(0, OWN)
    present = mine < own
    lists = tl.num_programs(2) * tl.num_programs(1) * own
    entry = (batch * tl.num_programs(1) + line) * own + mine
    # 64 bits: at a million tokens a head has 2^26 tiles.
    kinds += batch.to(tl.int64) * mask_stride
    own_place = tl.load(own_at + mine, mask=present, other=0)
    full_at = tl.zeros([OWN], tl.int64)
    partial_at = tl.zeros([OWN], tl.int64)
    if WRITE:
        full_at += tl.load(starts + entry, mask=present, other=0)
        partial_at += tl.load(starts + lists + entry, mask=present, other=0)
    for member in range(GROUP):
        of_head = table + batch.to(tl.int64) * table_stride_b + (line * GROUP + member).to(tl.int64) * table_stride_h
        for first in tl.range(0, other, OTHER):
            tile = first + tl.arange(0, OTHER)
            inside = present[:, None] & (tile < other)[None, :]
            place = own_place[:, None] + tl.load(other_at + tile, mask=tile < other, other=0)[None, :]
            inside &= (place >= 0) & (place < places)
            chosen = tl.load(of_head + place, mask=inside, other=0) != 0
            kind = tl.load(kinds + (mine[:, None] * own_stride + tile[None, :] * other_stride), mask=chosen, other=0)
            full = (chosen & (kind == _FULL)).to(tl.int32)
            partial = (chosen & (kind == _PARTIAL)).to(tl.int32)
            if WRITE:
                number = member * other + tile[None, :] + tl.zeros_like(full)
                tl.store(tiles + full_at[:, None] + tl.cumsum(full, 1) - 1, number, mask=full != 0)
                tl.store(tiles + partial_at[:, None] + tl.cumsum(partial, 1) - 1, number, mask=partial != 0)
            full_at += tl.sum(full, 1)
            partial_at += tl.sum(partial, 1)
    if not WRITE:
        tl.store(counts + 1 + entry, full_at, mask=present)
        tl.store(counts + 1 + lists + entry, partial_at, mask=present)
        if (tl.program_id(0) == 0) & (line == 0) & (batch == 0):
            tl.store(counts, 0)


@triton.jit
def first_not_below(values, wanted, active, length):
    """For each of `wanted` the first of `length` ascending values that is not below it: its number, or length."""
    low = tl.zeros_like(wanted)
    high = low + length
    span = length
    while span > 0:
        middle = (low + high) // 2
        below = tl.load(values + middle, mask=active & (low < high), other=2147483647) < wanted
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low <= middle) & (low < high), middle, high)
        span = span // 2
    return low


@triton.jit
def columns_kernel(
    wanted,  # Selection.columns, [B or 1, H, most]
    k_positions,  # [keys]
    key_at,  # [key tiles]
    slots,  # [B or 1, H, most]: those that are here, ascending, then `keys`
    slots_at,  # [B or 1, H, most]: key_at of each one's tile
    places,  # [B or 1, H, keys + 1], zeros: gets one more than a column's number at its slot
    keys,
    most,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The columns of one head that are among the keys here."""
    line = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    wanted += line * most
    slots += line * most
    slots_at += line * most
    found = 0
    for first in tl.range(0, most, CHUNK):
        number = first + tl.arange(0, CHUNK)
        position = tl.load(wanted + number, mask=number < most, other=2147483647)
        slot = first_not_below(k_positions, position, number < most, keys)
        here = (number < most) & (slot < keys)
        here &= tl.load(k_positions + slot, mask=here, other=-1) == position
        at = found + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(slots + at, slot, mask=here)
        tl.store(slots_at + at, tl.load(key_at + slot // TILE, mask=here, other=0), mask=here)
        tl.store(places + line * (keys + 1) + slot, at + 1, mask=here)
        found += tl.sum(here.to(tl.int32), 0)
    for first in tl.range(0, most, CHUNK):
        number = first + tl.arange(0, CHUNK)
        rest = (number >= found) & (number < most)
        tl.store(slots + number, tl.zeros_like(number) + keys, mask=rest)
        tl.store(slots_at + number, tl.zeros_like(number), mask=rest)


@triton.jit
def ranges_kernel(
    slots,  # [B or 1, H, most]
    first_seen,  # TileMap.spans, [mask batch, row tiles]
    last_seen,
    first,  # [B, H, row tiles]: the columns that a row tile may see are [first, stop) of its head's
    stop,
    most,
    row_tiles,
    slots_stride_b,
    mask_stride,
    BLOCK: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = tile < row_tiles
    slots += (batch * slots_stride_b + head).to(tl.int64) * most
    entry = (batch * tl.num_programs(1) + head) * row_tiles + tile
    low = tl.load(first_seen + batch * mask_stride + tile, mask=present, other=0)
    high = tl.load(last_seen + batch * mask_stride + tile, mask=present, other=0)
    begin = first_not_below(slots, low, present, most)
    tl.store(first + entry, begin, mask=present)
    tl.store(stop + entry, tl.maximum(first_not_below(slots, high, present, most), begin), mask=present)


@triton.jit
def groups_kernel(
    slots,  # [B or 1, H, most]
    first_seen,  # TileMap.spans, [mask batch, row tiles]
    last_seen,
    first,  # [B, H, groups]: the row tiles that may see one of a group's columns are among [first, stop)
    stop,
    most,
    row_tiles,
    slots_stride_b,
    mask_stride,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slots += (batch * slots_stride_b + head).to(tl.int64) * most
    lowest = tl.load(slots + group * GROUP)
    highest = tl.load(slots + tl.minimum((group + 1) * GROUP, most) - 1)
    begin = row_tiles
    end = 0
    for start in tl.range(0, row_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        low = tl.load(first_seen + batch * mask_stride + tile, mask=tile < row_tiles, other=2147483647)
        high = tl.load(last_seen + batch * mask_stride + tile, mask=tile < row_tiles, other=0)
        meets = (low <= highest) & (high > lowest)
        begin = tl.minimum(begin, tl.min(tl.where(meets, tile, row_tiles), 0))
        end = tl.maximum(end, tl.max(tl.where(meets, tile + 1, 0), 0))
    entry = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + group
    tl.store(first + entry, begin)
    tl.store(stop + entry, end)
