"""The ring: rows stay, keys and values go round (Ring Attention, arXiv:2310.01889)."""

from __future__ import annotations

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule
from farspan.parallel.plans.need import need


def ring(order: Order, mask: IntervalMask, heads: tuple[int, int], name: str = "ring") -> Plan:
    """At stage s rank r computes its rows against the keys of rank r - s, which then move on to rank r + 1.

    Backward the keys go the same way; their gradients follow one stage behind, so that a rank adds what arrives to what
    it has computed meanwhile, and the last hop brings them home. A block goes no further than the last rank whose rows
    need it, and one that nobody else needs does not leave. On zigzag orders the two chunks of a rank are blocks of
    their own, so a piece is the exact full or causal rectangle that the algorithm is known for.
    """
    world = order.world
    blocks: list[Block] = []
    rows = [_add(blocks, "q", order, rank, heads[0]) for rank in range(world)]
    keys = [_add(blocks, "kv", order, rank, heads[1]) for rank in range(world)]
    q = [index for rank in rows for index in rank]
    kv = [index for rank in keys for index in rank]
    # A set of pairs: looked up a million times for a thousand ranks.
    needed = {
        (q[i], kv[j]) for i, j in zip(*need(order, mask, [blocks[b] for b in q], [blocks[b] for b in kv]).nonzero())
    }

    forward: list[Move] = []
    home: list[Move] = []
    pieces: list[Piece] = []
    for owner in range(world):
        used: dict[int, list[int]] = {block: [] for block in keys[owner]}
        for stage in range(world):
            rank = (owner + stage) % world
            q_blocks = tuple(i for i in rows[rank] if any((i, j) in needed for j in keys[owner]))
            kv_blocks = tuple(j for j in keys[owner] if any((i, j) in needed for i in rows[rank]))
            if not q_blocks:
                continue
            pieces.append(Piece(rank, stage, q_blocks, kv_blocks))
            for block in kv_blocks:
                used[block].append(stage)
        for block, stages in used.items():
            last = max(stages, default=0)
            first = min((stage for stage in stages if stage > 0), default=world)
            for stage in range(1, last + 1):
                rank, before = (owner + stage) % world, (owner + stage - 1) % world
                forward.append(Move(block, before, rank, stage - 1, stage))
                if stage >= first:
                    after = (rank + 1) % world if stage < last else owner
                    home.append(Move(block, rank, after, stage + 1, stage + 2, home=True))
    return Plan(
        name,
        world,
        heads,
        tuple(blocks),
        Schedule(tuple(forward), tuple(pieces)),
        Schedule(tuple(forward + home), tuple(pieces)),
    )


def _add(blocks: list[Block], side: str, order: Order, rank: int, heads: int) -> list[int]:
    """Appends the blocks of one rank, one a span of its slots, and says at which indices they are."""
    first = len(blocks)
    blocks.extend(Block(side, rank, span, (0, heads)) for span in order.spans(rank))  # type: ignore[arg-type]
    return list(range(first, len(blocks)))
