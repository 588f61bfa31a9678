"""Checks a plan by carrying it out symbolically on a CPU, before any GPU runs it."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel import balance
from farspan.parallel.columns import cells
from farspan.parallel.orders import Order
from farspan.parallel.pairs import VisiblePairs, visible_pairs
from farspan.parallel.plan import DIRECTIONS, Block, Direction, Plan, PlanError
from farspan.parallel.report import Report

__all__ = ["PlanError", "verify"]


def verify(plan: Plan, order: Order, mask: IntervalMask, *, head_dim: int = 1, batch: int = 1) -> Report:
    """Raises `PlanError`, naming what is wrong, unless the plan computes exactly this mask on this order.

    Checked in both directions: blocks partition each rank's slots x heads; every visible pair is in exactly one piece
    for every head; heads meet their kv heads; operands are where a piece or a move uses them (derived from the moves
    and, backward, from `kept`); every result comes home to its owner. Cost: rows + pairs of blocks.

    Two things need no check. Sends agree with receives, since one list of moves with both ends is all there is. And
    ranks do not wait for each other in a circle: all moves go forward in time (which is checked), a rank waits at stage
    s for what other ranks posted at an earlier stage alone, and so on down to stage 0, where nobody waits.
    """
    _check_partition(plan, order)
    visible = visible_pairs(plan, order, mask)
    for direction in DIRECTIONS:
        _check_coverage(plan, direction, visible)
        _check_moves(plan, direction)
        _check_operands(plan, direction)
        _check_results(plan, direction)
    return Report(
        plan,
        visible,
        {direction: balance.work(plan, direction, visible) for direction in DIRECTIONS},
        {direction: balance.elements(plan, direction, head_dim, batch) for direction in DIRECTIONS},
        {direction: balance.peak_slots(plan, direction) for direction in DIRECTIONS},
    )


def _check_partition(plan: Plan, order: Order) -> None:
    if order.world != plan.world:
        raise PlanError(f"the plan is for {plan.world} ranks, the order for {order.world}")
    by_side: dict[tuple[str, int], list[Block]] = defaultdict(list)
    for block in plan.blocks:
        by_side[block.side, block.owner].append(block)
    for side, heads in zip(("q", "kv"), plan.heads):
        for rank in range(plan.world):
            blocks = by_side[side, rank]
            if sum(block.size for block in blocks) != order.slots * heads:
                raise PlanError(
                    f"the {side} blocks of rank {rank} do not add up to its {order.slots} slots x {heads} heads"
                )
            edges = sorted({edge for block in blocks for edge in block.slots})
            for low, high in pairwise(edges):
                taken = sorted(b.heads for b in blocks if b.slots[0] <= low and high <= b.slots[1])
                if [head for span in taken for head in range(*span)] != list(range(heads)):
                    raise PlanError(f"the {side} blocks of rank {rank} overlap or leave a gap in slots {low} to {high}")


def _check_coverage(plan: Plan, direction: Direction, visible: VisiblePairs) -> None:
    """Every visible pair of blocks whose heads overlap is in one piece, and none is in two."""
    schedule, blocks = plan.schedule(direction), plan.blocks
    group = plan.heads[0] // plan.heads[1]
    low, high = np.array([block.heads for block in blocks], np.int64).reshape(-1, 2).T
    piece, q, kv = schedule.piece_columns.pairs()
    strangers = (low[q] < low[kv] * group) | (high[q] > high[kv] * group)
    if strangers.any():
        at = strangers.argmax()
        raise PlanError(
            f"{direction}: in {schedule.pieces[piece[at]]} query heads {low[q[at]]} to {high[q[at]]} do not meet their "
            "kv heads"
        )
    computed = np.sort(q * len(blocks) + kv)
    again = computed[1:][computed[1:] == computed[:-1]]
    if len(again):
        i, j = divmod(int(again[0]), len(blocks))
        times = (computed == again[0]).sum()
        raise PlanError(f"{direction}: {blocks[i]} x {blocks[j]} is computed {times} times")
    # No pair of blocks is there twice and all have heads that meet: so it is enough to count those of each two spans.
    found = np.zeros_like(visible.area)
    np.add.at(*cells(found, visible.span[q], visible.span[kv]), 1)
    missing = (visible.area > 0) & (found < _pairs_of_heads(plan, visible))
    if missing.any():
        i, j = _first_missing(plan, visible, missing, set(computed.tolist()))
        area = visible.area[visible.span[i], visible.span[j]]
        raise PlanError(f"{direction}: {area} visible pairs of {blocks[i]} x {blocks[j]} are never computed")


def _pairs_of_heads(plan: Plan, visible: VisiblePairs) -> np.ndarray:
    """`[spans of rows, spans of keys]`: how many pairs of their blocks share heads."""
    group = plan.heads[0] // plan.heads[1]
    cuts: dict[str, list[list[tuple[int, int]]]] = {
        "q": [[] for _ in range(visible.area.shape[0])],
        "kv": [[] for _ in range(visible.area.shape[1])],
    }
    for block, span in zip(plan.blocks, visible.span.tolist()):
        cuts[block.side][span].append(block.heads)
    # Most spans are cut into the same heads.
    kinds = {side: sorted({tuple(heads) for heads in of_side}) for side, of_side in cuts.items()}
    table = np.array(
        [[sum(_share(a, b, group) for a in rows for b in keys) for keys in kinds["kv"]] for rows in kinds["q"]]
    )
    kind_q, kind_kv = (np.array([kinds[s].index(tuple(heads)) for heads in cuts[s]]) for s in ("q", "kv"))
    counts: np.ndarray = table[kind_q][:, kind_kv]
    return counts


def _share(query_heads: tuple[int, int], kv_heads: tuple[int, int], group: int) -> bool:
    return query_heads[0] < kv_heads[1] * group and kv_heads[0] * group < query_heads[1]


def _first_missing(plan: Plan, visible: VisiblePairs, missing: np.ndarray, computed: set[int]) -> tuple[int, int]:
    """Two blocks that no piece computes, in two spans that miss some."""
    rows, keys = (int(span) for span in np.argwhere(missing)[0])
    blocks, group = list(enumerate(plan.blocks)), plan.heads[0] // plan.heads[1]
    return next(
        (i, j)
        for i, q in blocks
        for j, kv in blocks
        if (q.side, visible.span[i], kv.side, visible.span[j]) == ("q", rows, "kv", keys)
        and _share(q.heads, kv.heads, group)
        and i * len(blocks) + j not in computed
    )


def _check_moves(plan: Plan, direction: Direction) -> None:
    schedule = plan.schedule(direction)
    moves = schedule.move_columns
    strange = (moves.src == moves.dst) | (np.minimum(moves.src, moves.dst) < 0)
    strange |= np.maximum(moves.src, moves.dst) >= plan.world
    if strange.any():
        raise PlanError(f"{direction}: {schedule.moves[strange.argmax()]} has no such peers among {plan.world} ranks")
    back = (moves.start < 0) | (moves.stop <= moves.start)
    if back.any():
        raise PlanError(f"{direction}: {schedule.moves[back.argmax()]} does not go forward in time")


def _check_operands(plan: Plan, direction: Direction) -> None:
    """Whoever sends or computes with an operand holds it by then.

    A rank holds a block from its first arrival on, if the move that brings it was right; and since moves go forward in
    time, that follows by induction over stages from all moves being right.
    """
    schedule = plan.schedule(direction)
    moves, pieces, stages = schedule.move_columns, schedule.piece_columns, schedule.stages
    since = np.full((plan.world, len(plan.blocks)), stages)
    operand = ~moves.home
    np.minimum.at(*cells(since, moves.dst[operand], moves.block[operand]), moves.stop[operand])
    since[_owners(plan), np.arange(len(plan.blocks))] = 0
    if direction == "backward":
        for rank, block in _arrived_in_forward(plan):
            since[rank, block] = 0
    missing = operand & (since[moves.src, moves.block] > moves.start)
    if missing.any():
        move = schedule.moves[missing.argmax()]
        raise PlanError(f"{direction}: rank {move.src} does not hold what it sends in {move}")
    for uses in (pieces.q, pieces.kv):
        lacking = since[pieces.rank[uses.pieces], uses.blocks] > pieces.stage[uses.pieces]
        if lacking.any():
            at = lacking.argmax()
            piece, block = schedule.pieces[uses.pieces[at]], uses.blocks[at]
            raise PlanError(f"{direction}: {piece} lacks block {block}, {plan.blocks[block]}")


def _arrived_in_forward(plan: Plan) -> frozenset[tuple[int, int]]:
    arrived = {(move.dst, move.block) for move in plan.forward.moves if not move.home} if plan.kept else set()
    for rank, block in plan.kept:
        if (rank, block) not in arrived or plan.blocks[block].side != "kv":
            raise PlanError(
                f"kept names block {block} on rank {rank}, which no forward move of keys and values brings there"
            )
    return plan.kept


# What happens to a result on one rank within one stage, in this order.
_ARRIVES, _LEAVES, _IS_COMPUTED = range(3)


def _check_results(plan: Plan, direction: Direction) -> None:
    """Every result comes home.

    Results are added where they meet and forgotten where they leave, so none is ever doubled; what is to be shown is
    that there is one wherever one leaves, and that none is left behind.
    """
    schedule = plan.schedule(direction)
    moves, pieces, stages = schedule.move_columns, schedule.piece_columns, schedule.stages

    def events(rank: np.ndarray, block: np.ndarray, stage: np.ndarray, what: int) -> np.ndarray:
        """One number each, which sorts by place (rank and block), then by time."""
        return ((rank * len(plan.blocks) + block) * stages + stage) * 3 + what

    home = moves.home
    happened = [
        events(moves.dst[home], moves.block[home], moves.stop[home], _ARRIVES),
        events(moves.src[home], moves.block[home], moves.start[home], _LEAVES),
    ]
    for uses in (pieces.q, pieces.kv) if direction == "backward" else (pieces.q,):
        happened.append(events(pieces.rank[uses.pieces], uses.blocks, pieces.stage[uses.pieces], _IS_COMPUTED))
    in_order = np.sort(np.concatenate(happened))
    (place, _), leaves = np.divmod(in_order, 3 * stages), in_order % 3 == _LEAVES
    continues = np.append(False, place[1:] == place[:-1])[: len(place)]
    nothing = leaves & ~(continues & ~np.roll(leaves, 1))
    if nothing.any():
        at = int(np.flatnonzero(events(moves.src, moves.block, moves.start, _LEAVES) == in_order[nothing.argmax()])[-1])
        raise PlanError(f"{direction}: there is no result to send in {schedule.moves[at]}")
    last = ~np.append(continues[1:], False)[: len(place)]
    rank, block = np.divmod(place[last & ~leaves], max(1, len(plan.blocks)))
    left = rank != _owners(plan)[block]
    if left.any():
        index, where = int(block[left.argmax()]), rank[left.argmax()]
        raise PlanError(f"{direction}: a result of block {index}, {plan.blocks[index]}, is left on rank {where}")


def _owners(plan: Plan) -> np.ndarray:
    return np.array([block.owner for block in plan.blocks], np.int64)
