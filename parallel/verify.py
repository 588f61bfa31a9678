"""Checks a plan by carrying it out symbolically on a CPU, before any GPU runs it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Plan, Schedule, parts


class PlanError(ValueError):
    """A plan that would not compute the attention it was made for."""


@dataclass(frozen=True)
class Report:
    """What `verify` found out about a plan that is right.

    `pairs` counts visible (row, key) pairs of one query head. `imbalance` is the busiest rank's pairs over the mean;
    `stage_imbalance` weighs each stage by its own busiest rank, as ranks wait for each other there.
    `peak_slots` is the most foreign slots x kv heads that a rank holds at once (forward, backward).
    """

    pairs: int
    pairs_by_rank: list[int]
    imbalance: float
    stage_imbalance: float
    elements_sent: dict[str, list[tuple[int, int]]]
    peak_slots: dict[str, int]
    head_dim: int = field(default=1)

    def bytes_sent(self, direction: str, itemsize: int, accumulation_itemsize: int) -> list[int]:
        """By rank, for operands of `itemsize` bytes and the head dim that `verify` was given."""
        return [own * itemsize + wide * accumulation_itemsize for own, wide in self.elements_sent[direction]]


def verify(plan: Plan, order: Order, mask: IntervalMask, *, head_dim: int = 1, batch: int = 1) -> Report:
    """Raises `PlanError`, naming what is wrong, unless the plan computes exactly this mask on this order.

    Checked in both directions: blocks partition each rank's slots x heads; every visible pair is in exactly one piece
    for every head; heads meet their kv heads; operands are where a piece or a move uses them (derived from the moves
    and, backward, from `kept`); every contribution comes home to its owner exactly once. Cost: rows + pairs of blocks.
    """
    _check_partition(plan, order)
    areas = _areas(plan, order, mask)
    for direction in ("forward", "backward"):
        _check_coverage(plan, direction, areas)
        _check_flow(plan, direction)
    by_rank_stage: Counter[tuple[int, int]] = Counter()
    for piece in plan.forward.pieces:
        for q in piece.q:
            heads = plan.blocks[q].heads[1] - plan.blocks[q].heads[0]
            for kv in piece.kv:
                by_rank_stage[piece.rank, piece.stage] += areas.get((q, kv), 0) * heads
    query_heads = plan.heads[0]
    by_rank = [sum(n for (rank, _), n in by_rank_stage.items() if rank == r) // query_heads for r in range(plan.world)]
    stages = {stage for _, stage in by_rank_stage}
    busiest = sum(max(by_rank_stage[rank, stage] for rank in range(plan.world)) for stage in stages)
    total = sum(by_rank_stage.values())
    return Report(
        pairs=total // query_heads,
        pairs_by_rank=by_rank,
        imbalance=max(by_rank) * plan.world / max(1, sum(by_rank)),
        stage_imbalance=busiest * plan.world / max(1, total),
        elements_sent={d: _elements_sent(plan, d, head_dim, batch) for d in ("forward", "backward")},
        peak_slots={d: _peak(plan, d) for d in ("forward", "backward")},
        head_dim=head_dim,
    )


def _schedule(plan: Plan, direction: str) -> Schedule:
    return plan.forward if direction == "forward" else plan.backward


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


def _areas(plan: Plan, order: Order, mask: IntervalMask) -> dict[tuple[int, int], int]:
    """Visible pairs of every (q block, kv block) that has any, whatever pieces the plan holds.

    For one block of rows, how many of them see each position is a running sum of +1 at begins and -1 at ends; summed
    over the positions of a block of keys that is the number of pairs. Written apart from the builders' own geometry.
    """
    # Blocks with the same owner and slots differ in heads only, and share their areas.
    spans: dict[tuple[str, int, tuple[int, int]], list[int]] = defaultdict(list)
    for index, block in enumerate(plan.blocks):
        spans[block.side, block.owner, block.slots].append(index)
    keys = [
        (indices, plan.blocks[indices[0]].positions(order)) for (side, *_), indices in spans.items() if side == "kv"
    ]
    of_position = np.full(order.length, -1, np.int64)
    for number, (_, positions) in enumerate(keys):
        real = positions[positions < order.length]
        if (of_position[real] != -1).any():
            raise PlanError("two blocks of keys hold the same token")
        of_position[real] = number
    if (of_position == -1).any():
        raise PlanError(f"token {int((of_position == -1).argmax())} is in no block of keys")
    bounds = [bound.cpu().numpy() for bound in mask.bounds]
    areas: dict[tuple[int, int], int] = {}
    for (side, *_), indices in spans.items():
        if side != "q":
            continue
        positions = plan.blocks[indices[0]].positions(order)
        rows = positions[positions < order.length]
        change = np.zeros(order.length + 1, np.int64)
        for low, high in (bounds[:2], bounds[2:]):
            np.add.at(change, low[:, rows].ravel(), 1)
            np.add.at(change, high[:, rows].ravel(), -1)
        counts = np.bincount(of_position, weights=change.cumsum()[:-1], minlength=len(keys))
        for number in np.flatnonzero(counts).tolist():
            for q in indices:
                for kv in keys[number][0]:
                    areas[q, kv] = int(counts[number])
    return areas


def _check_coverage(plan: Plan, direction: str, areas: dict[tuple[int, int], int]) -> None:
    group = plan.heads[0] // plan.heads[1]
    computed: Counter[tuple[int, int]] = Counter()
    for piece in _schedule(plan, direction).pieces:
        for q in piece.q:
            for kv in piece.kv:
                low, high = plan.blocks[q].heads
                if not (plan.blocks[kv].heads[0] <= low // group and (high - 1) // group < plan.blocks[kv].heads[1]):
                    raise PlanError(f"{direction}: in {piece} query heads {low} to {high} do not meet their kv heads")
                computed[q, kv] += 1
    for (q, kv), times in computed.items():
        if times > 1:
            raise PlanError(f"{direction}: {plan.blocks[q]} x {plan.blocks[kv]} is computed {times} times")
    for (q, kv), area in areas.items():
        low, high = plan.blocks[q].heads
        first, last = plan.blocks[kv].heads
        if low < last * group and first * group < high and (q, kv) not in computed:
            raise PlanError(
                f"{direction}: {area} visible pairs of {plan.blocks[q]} x {plan.blocks[kv]} are never computed"
            )


def _check_flow(plan: Plan, direction: str) -> None:
    """Operands are where they are used, and every contribution comes home exactly once."""
    schedule = _schedule(plan, direction)
    for move in schedule.moves:
        if move.src == move.dst or not (0 <= move.src < plan.world and 0 <= move.dst < plan.world):
            raise PlanError(f"{direction}: {move} has no such peers among {plan.world} ranks")
        if not 0 <= move.start < move.stop:
            raise PlanError(f"{direction}: {move} does not go forward in time")
    here = {(block.owner, index) for index, block in enumerate(plan.blocks)}
    if direction == "backward":
        here |= _arrived_in_forward(plan)
    held: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    starting, stopping, computing = _by_stage(schedule)
    flying: dict[Move, Counter[int]] = {}
    for stage in range(schedule.stages):
        for move in stopping[stage]:
            if move.home:
                held[move.dst, move.block] += flying.pop(move)
            else:
                here.add((move.dst, move.block))
        for move in starting[stage]:
            if move.home:
                carried = held.pop((move.src, move.block), None)
                if not carried:
                    raise PlanError(f"{direction}: there is no result to send in {move}")
                flying[move] = carried
            elif (move.src, move.block) not in here:
                raise PlanError(f"{direction}: rank {move.src} does not hold what it sends in {move}")
        for number in computing[stage]:
            piece = schedule.pieces[number]
            for block in piece.q + piece.kv:
                if (piece.rank, block) not in here:
                    raise PlanError(f"{direction}: {piece} lacks block {block}, {plan.blocks[block]}")
            for block in piece.q + (piece.kv if direction == "backward" else ()):
                held[piece.rank, block][number] += 1
    _check_all_home(plan, direction, held)


def _check_all_home(plan: Plan, direction: str, held: dict[tuple[int, int], Counter[int]]) -> None:
    schedule = _schedule(plan, direction)
    arrived: dict[int, Counter[int]] = defaultdict(Counter)
    for (rank, block), pieces in held.items():
        if pieces and rank != plan.blocks[block].owner:
            raise PlanError(f"{direction}: a result of block {block}, {plan.blocks[block]}, is left on rank {rank}")
        arrived[block] += pieces
    for number, piece in enumerate(schedule.pieces):
        for block in piece.q + (piece.kv if direction == "backward" else ()):
            if arrived[block][number] != 1:
                raise PlanError(
                    f"{direction}: the result of {piece} for block {block} comes home {arrived[block][number]} times"
                )


def _arrived_in_forward(plan: Plan) -> set[tuple[int, int]]:
    arrived = {(move.dst, move.block) for move in plan.forward.moves if not move.home}
    for rank, block in plan.kept:
        if (rank, block) not in arrived or plan.blocks[block].side != "kv":
            raise PlanError(
                f"kept names block {block} on rank {rank}, which no forward move of keys and values brings there"
            )
    return set(plan.kept)


def _by_stage(schedule: Schedule) -> tuple[dict[int, list[Move]], dict[int, list[Move]], dict[int, list[int]]]:
    starting: dict[int, list[Move]] = defaultdict(list)
    stopping: dict[int, list[Move]] = defaultdict(list)
    computing: dict[int, list[int]] = defaultdict(list)
    for move in schedule.moves:
        starting[move.start].append(move)
        stopping[move.stop].append(move)
    for number, piece in enumerate(schedule.pieces):
        computing[piece.stage].append(number)
    return starting, stopping, computing


def _elements_sent(plan: Plan, direction: str, head_dim: int, batch: int) -> list[tuple[int, int]]:
    """By rank: (elements in the tensors' own dtype, elements in the accumulation dtype)."""
    sent = [[0, 0] for _ in range(plan.world)]
    for move in _schedule(plan, direction).moves:
        for part in parts(plan, move, backward=direction == "backward"):
            sent[move.src][part.accumulated] += batch * part.rows * part.heads * (head_dim if part.wide else 1)
    return [(own, wide) for own, wide in sent]


def _peak(plan: Plan, direction: str) -> int:
    """Most foreign slots x kv heads on one rank at once: from the stage a receive is posted to the last use."""
    schedule = _schedule(plan, direction)
    last: dict[tuple[int, int], int] = {}
    first: dict[tuple[int, int], int] = {}
    for move in schedule.moves:
        if not move.home:
            last[move.src, move.block] = max(last.get((move.src, move.block), 0), move.start)
            key = (move.dst, move.block)
            first[key] = min(first.get(key, move.start), move.start)
    for piece in schedule.pieces:
        for block in piece.kv:
            last[piece.rank, block] = max(last.get((piece.rank, block), 0), piece.stage)
    change: dict[int, Counter[int]] = defaultdict(Counter)
    for (rank, block), stage in first.items():
        if plan.blocks[block].side == "kv":
            change[rank][stage] += plan.blocks[block].size
            change[rank][last.get((rank, block), stage) + 1] -= plan.blocks[block].size
    peaks = [0]
    for stages in change.values():
        held = 0
        for stage in sorted(stages):
            held += stages[stage]
            peaks.append(held)
    return max(peaks)
