"""Checks a plan by carrying it out symbolically on a CPU, before any GPU runs it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule, parts


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

    def bytes_sent(self, direction: str, itemsize: int, accumulation_itemsize: int) -> list[int]:
        """By rank, for operands of `itemsize` bytes and the head dim that `verify` was given."""
        return [own * itemsize + wide * accumulation_itemsize for own, wide in self.elements_sent[direction]]


def verify(plan: Plan, order: Order, mask: IntervalMask, *, head_dim: int = 1, batch: int = 1) -> Report:
    """Raises `PlanError`, naming what is wrong, unless the plan computes exactly this mask on this order.

    Checked in both directions: blocks partition each rank's slots x heads; every visible pair is in exactly one piece
    for every head; heads meet their kv heads; operands are where a piece or a move uses them (derived from the moves
    and, backward, from `kept`); every result comes home to its owner. Cost: rows + pairs of blocks.
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
    by_rank, busiest_of_stage = [0] * plan.world, Counter[int]()
    for (rank, stage), pairs in by_rank_stage.items():
        by_rank[rank] += pairs
        busiest_of_stage[stage] = max(busiest_of_stage[stage], pairs)
    total = sum(by_rank)
    return Report(
        pairs=total // query_heads,
        pairs_by_rank=[pairs // query_heads for pairs in by_rank],
        imbalance=max(by_rank) * plan.world / max(1, total),
        stage_imbalance=busiest_of_stage.total() * plan.world / max(1, total),
        elements_sent={d: _elements_sent(plan, d, head_dim, batch) for d in ("forward", "backward")},
        peak_slots={d: _peak(plan, d) for d in ("forward", "backward")},
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

    For one block of rows, the pairs with keys below x are a sum over rows of x - begin where begin < x, less the same
    for ends. Its differences between the bounds of runs of keys are the areas. Written apart from the builders' own
    geometry.
    """
    # Blocks with the same owner and slots differ in heads only, and share their areas.
    spans: dict[tuple[str, int, tuple[int, int]], list[int]] = defaultdict(list)
    for index, block in enumerate(plan.blocks):
        spans[block.side, block.owner, block.slots].append(index)
    groups = [indices for (side, *_), indices in spans.items() if side == "kv"]
    edges, of_run = _key_runs([plan.blocks[indices[0]].positions(order) for indices in groups], order.length)
    bounds = [bound.cpu().numpy().astype(np.int64) for bound in mask.bounds]
    areas: dict[tuple[int, int], int] = {}
    for (side, *_), indices in spans.items():
        if side != "q":
            continue
        positions = plan.blocks[indices[0]].positions(order)
        rows = positions[positions < order.length]
        begin, end, anchor_begin, anchor_end = (bound[:, rows].ravel() for bound in bounds)
        below = _sum_below(np.concatenate([begin, anchor_begin]), edges)
        below -= _sum_below(np.concatenate([end, anchor_end]), edges)
        counts = np.zeros(len(groups), np.int64)
        np.add.at(counts, of_run, np.diff(below))
        for group in np.flatnonzero(counts).tolist():
            area = int(counts[group])
            areas.update({(q, kv): area for q in indices for kv in groups[group]})
    return areas


def _key_runs(blocks: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts [0, length) where the holder of the keys changes: edges `[runs + 1]` and the holding block of each run."""
    holder = np.full(length, -1, np.int64)
    for number, positions in enumerate(blocks):
        real = positions[positions < length]
        if (holder[real] != -1).any():
            raise PlanError("two blocks of keys hold the same token")
        holder[real] = number
    if (holder == -1).any():
        raise PlanError(f"token {int((holder == -1).argmax())} is in no block of keys")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(holder)) + 1])
    return np.concatenate([starts, [length]]), holder[starts]


def _sum_below(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """For each edge x, the sum of x - value over the values below x."""
    values = np.sort(values)
    total = np.concatenate([[0], values.cumsum()])
    count = np.searchsorted(values, edges)
    return edges * count - total[count]


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
    """Operands are where they are used, and every result comes home.

    Results are added where they meet and forgotten where they leave, so none is ever doubled; what is to be shown is
    that none is left behind.
    """
    schedule = _schedule(plan, direction)
    for move in schedule.moves:
        if move.src == move.dst or not (0 <= move.src < plan.world and 0 <= move.dst < plan.world):
            raise PlanError(f"{direction}: {move} has no such peers among {plan.world} ranks")
        if not 0 <= move.start < move.stop:
            raise PlanError(f"{direction}: {move} does not go forward in time")
    here = {(block.owner, index) for index, block in enumerate(plan.blocks)}
    if direction == "backward":
        here |= _arrived_in_forward(plan)
    results: set[tuple[int, int]] = set()
    starting, stopping, computing = _by_stage(schedule)
    for stage in range(schedule.stages):
        for move in stopping[stage]:
            (results if move.home else here).add((move.dst, move.block))
        for move in starting[stage]:
            if move.home and (move.src, move.block) not in results:
                raise PlanError(f"{direction}: there is no result to send in {move}")
            if not move.home and (move.src, move.block) not in here:
                raise PlanError(f"{direction}: rank {move.src} does not hold what it sends in {move}")
            if move.home:
                results.remove((move.src, move.block))
        for piece in computing[stage]:
            for block in piece.q + piece.kv:
                if (piece.rank, block) not in here:
                    raise PlanError(f"{direction}: {piece} lacks block {block}, {plan.blocks[block]}")
            results.update((piece.rank, block) for block in piece.q + (piece.kv if direction == "backward" else ()))
    for rank, index in results:
        if rank != plan.blocks[index].owner:
            raise PlanError(f"{direction}: a result of block {index}, {plan.blocks[index]}, is left on rank {rank}")


def _arrived_in_forward(plan: Plan) -> set[tuple[int, int]]:
    arrived = {(move.dst, move.block) for move in plan.forward.moves if not move.home}
    for rank, block in plan.kept:
        if (rank, block) not in arrived or plan.blocks[block].side != "kv":
            raise PlanError(
                f"kept names block {block} on rank {rank}, which no forward move of keys and values brings there"
            )
    return set(plan.kept)


def _by_stage(schedule: Schedule) -> tuple[dict[int, list[Move]], dict[int, list[Move]], dict[int, list[Piece]]]:
    starting: dict[int, list[Move]] = defaultdict(list)
    stopping: dict[int, list[Move]] = defaultdict(list)
    computing: dict[int, list[Piece]] = defaultdict(list)
    for move in schedule.moves:
        starting[move.start].append(move)
        stopping[move.stop].append(move)
    for piece in schedule.pieces:
        computing[piece.stage].append(piece)
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
