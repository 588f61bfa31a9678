"""Whose turn it is to add to a row tile of dq: counters in global memory, and the two warps that watch over them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from farspan.kernels.triton.hopper.common import wait_for, wait_for_room


@gluon.jit
def visited(step, row_tiles, GROUP: gl.constexpr):
    """A step's query head within the group, and its row tile."""
    return step % GROUP, row_tiles - 1 - step // GROUP


@gluon.jit
def asker(turns, walk, counters, tile, GROUP: gl.constexpr):
    """Waits for the turn of each step, but runs no further ahead of the teller than the ring of rows is long."""
    my_turn, told, last_added = turns
    count, first_full, row_tiles = walk
    for step in range(GROUP * count):
        member, i = visited(step, row_tiles, GROUP)
        wait_for_room(told, step)
        counter = counters + (member * row_tiles + i)
        while _acquire(counter) < tile:
            pass
        mbarrier.arrive(my_turn.index(step % my_turn.shape[0]), count=1)


@gluon.jit
def teller(turns, empty, walk, counters, GROUP: gl.constexpr, LAG: gl.constexpr):
    """Hands on the turn of each step, once both consumers have added to its row tile."""
    my_turn, told, last_added = turns
    count, first_full, row_tiles = walk
    for step in range(GROUP * count):
        member, i = visited(step, row_tiles, GROUP)
        if step + LAG < GROUP * count:
            wait_for(empty, step + LAG)
        else:
            mbarrier.wait(last_added.index(0), 0)
        gl.atomic_add(counters + (member * row_tiles + i), 1, sem="release")
        mbarrier.arrive(told.index(step % told.shape[0]), count=1)


@gluon.jit
def _acquire(counter):
    """Reads a counter in global memory, so that what was written before it was raised is seen from here on."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
    )
