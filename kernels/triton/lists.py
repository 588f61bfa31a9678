"""The kernel that lists the selected tiles of a sparse index, by head."""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.tiles import Kind

_FULL, _PARTIAL = tl.constexpr(int(Kind.FULL)), tl.constexpr(int(Kind.PARTIAL))


@triton.jit
def lists_kernel(
    selected,  # [B, H, row tiles, key tiles]
    kinds,  # [mask batch, row tiles, key tiles]
    full_start,  # where each list begins; where its length goes, unless WRITE
    partial_start,
    full_tiles,
    partial_tiles,
    own,  # tiles of the side whose lists these are
    other,  # tiles of the other side
    own_stride,
    other_stride,
    head_stride,
    mask_stride,
    WRITE: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """The lists of some tiles of one side: a walk over the other side's, with a running count for each list."""
    # 64 bits: at a million tokens a head has 2^26 tiles.
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    mine = tl.program_id(0) * OWN + tl.arange(0, OWN)
    present = mine < own
    entry = row * own + mine
    selected += row * head_stride
    kinds += tl.program_id(2).to(tl.int64) * mask_stride
    full_at = tl.zeros([OWN], tl.int64)
    partial_at = tl.zeros([OWN], tl.int64)
    if WRITE:
        full_at += tl.load(full_start + entry, mask=present, other=0)
        partial_at += tl.load(partial_start + entry, mask=present, other=0)
    for first in tl.range(0, other, OTHER):
        tile = first + tl.arange(0, OTHER)
        at = mine[:, None] * own_stride + tile[None, :] * other_stride
        inside = present[:, None] & (tile < other)[None, :]
        chosen = tl.load(selected + at, mask=inside, other=0) != 0
        kind = tl.load(kinds + at, mask=inside, other=0)
        full = (chosen & (kind == _FULL)).to(tl.int32)
        partial = (chosen & (kind == _PARTIAL)).to(tl.int32)
        if WRITE:
            number = tile[None, :] + tl.zeros_like(full)
            tl.store(full_tiles + full_at[:, None] + tl.cumsum(full, 1) - 1, number, mask=full != 0)
            tl.store(partial_tiles + partial_at[:, None] + tl.cumsum(partial, 1) - 1, number, mask=partial != 0)
        full_at += tl.sum(full, 1)
        partial_at += tl.sum(partial, 1)
    if not WRITE:
        tl.store(full_start + entry, full_at.to(tl.int32), mask=present)
        tl.store(partial_start + entry, partial_at.to(tl.int32), mask=present)
