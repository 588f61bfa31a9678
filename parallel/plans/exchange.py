"""Direct sends: owners send keys and values straight to the ranks that use them."""

from __future__ import annotations

import itertools

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule
from farspan.parallel.plans.need import need


def all_gather(order: Order, mask: IntervalMask, heads: tuple[int, int], slices: int | None = None) -> Plan:
    """Every rank receives the keys and values that its rows need from all other ranks, some kv heads at a time.

    Slice j of the kv heads travels during stage j, while the slice before it is computed, so that a rank holds the
    whole row for one slice of heads and not for all (the head stride of Llama 3's context parallelism,
    arXiv:2407.21783). Ranks compute their own keys while the first slice is on its way. Gradients go straight home.
    """
    world, (query_heads, kv_heads) = order.world, heads
    slices = min(slices or 4, kv_heads)
    group = query_heads // kv_heads
    edges = [i * kv_heads // slices for i in range(slices + 1)]
    moves: list[Move] = []
    home: list[Move] = []
    pieces: list[Piece] = []
    blocks: list[Block] = []
    for stage, (low, high) in enumerate(itertools.pairwise(edges)):
        q = [Block("q", rank, (0, order.slots), (low * group, high * group)) for rank in range(world)]
        kv = [Block("kv", rank, (0, order.slots), (low, high)) for rank in range(world)]
        first_q, first_kv = len(blocks), len(blocks) + world
        blocks += q + kv
        needed = need(order, mask, q, kv)
        for rank in range(world):
            if needed[rank, rank]:
                pieces.append(Piece(rank, stage, (first_q + rank,), (first_kv + rank,)))
            remote = [owner for owner in range(world) if needed[rank, owner] and owner != rank]
            if remote:
                pieces.append(Piece(rank, stage + 1, (first_q + rank,), tuple(first_kv + owner for owner in remote)))
            for owner in remote:
                moves.append(Move(first_kv + owner, owner, rank, stage, stage + 1))
                home.append(Move(first_kv + owner, rank, owner, stage + 2, stage + 3, home=True))
    return Plan(
        "all_gather",
        world,
        heads,
        tuple(blocks),
        Schedule(tuple(moves), tuple(pieces)),
        Schedule(tuple(moves + home), tuple(pieces)),
    )
