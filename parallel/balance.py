"""What a plan asks of each rank at each stage: work, traffic and memory, and how evenly."""

from __future__ import annotations

import numpy as np

from farspan.parallel.columns import cells
from farspan.parallel.pairs import VisiblePairs
from farspan.parallel.plan import Direction, Move, Plan, parts


def work(plan: Plan, direction: Direction, pairs: VisiblePairs) -> np.ndarray:
    """Visible (row, key) pairs x query heads, int64 `[world, stages]`."""
    schedule = plan.schedule(direction)
    pieces = schedule.piece_columns
    heads = np.array([block.heads[1] - block.heads[0] for block in plan.blocks], np.int64)
    piece, q, kv = pieces.pairs()
    total = np.zeros((plan.world, schedule.stages), np.int64)
    np.add.at(*cells(total, pieces.rank[piece], pieces.stage[piece]), pairs.of(q, kv) * heads[q])
    return total


def imbalance(work: np.ndarray) -> float:
    """The busiest rank's work over the mean."""
    return float(work.sum(1).max(initial=0) * len(work) / max(1, work.sum()))


def stage_imbalance(work: np.ndarray) -> float:
    """As `imbalance`, but each stage weighs as much as its own busiest rank, as ranks wait for each other there."""
    return float(work.max(0, initial=0).sum() * len(work) / max(1, work.sum()))


def step_imbalance(work: np.ndarray) -> float:
    """A rank's heaviest stage over its mean one, averaged over ranks: in a light stage transfers cannot hide."""
    return float((work.max(1) * work.shape[1] / np.maximum(1, work.sum(1))).mean())


def elements(plan: Plan, direction: Direction, head_dim: int, batch: int) -> np.ndarray:
    """What each move carries, int64 `[moves, 2]`: elements in the tensors' own and in the accumulation dtype."""
    moves = plan.schedule(direction).move_columns
    # All moves of a block carry the same, but for operands and results.
    carried = np.zeros((2, len(plan.blocks), 2), np.int64)
    for home in (False, True):
        for block in np.unique(moves.block[moves.home == home]).tolist():
            for part in parts(plan, Move(block, 0, 0, 0, 0, home), backward=direction == "backward"):
                size = batch * part.rows * part.heads * (head_dim if part.wide else 1)
                carried[int(home), block, int(part.accumulated)] += size
    return carried[moves.home.astype(np.int64), moves.block]


def peak_slots(plan: Plan, direction: Direction) -> int:
    """Most foreign slots x kv heads on one rank at once: from the stage a receive is posted to the last use."""
    schedule = plan.schedule(direction)
    moves, pieces, stages = schedule.move_columns, schedule.piece_columns, schedule.stages
    size = np.array([block.size if block.side == "kv" else 0 for block in plan.blocks], np.int64)
    operand = ~moves.home
    src, dst, block, start = (column[operand] for column in (moves.src, moves.dst, moves.block, moves.start))
    first = np.full((plan.world, len(plan.blocks)), stages)
    last = np.full((plan.world, len(plan.blocks)), -1)
    np.minimum.at(*cells(first, dst, block), start)
    np.maximum.at(*cells(last, src, block), start)
    used = pieces.kv.pieces
    np.maximum.at(*cells(last, pieces.rank[used], pieces.kv.blocks), pieces.stage[used])
    rank, arriving = (first < stages).nonzero()
    begins, ends = first[rank, arriving], last[rank, arriving]
    ends = np.where(ends < 0, begins, ends)  # what nobody uses is dropped as it arrives
    change = np.zeros((plan.world, stages + 1), np.int64)
    np.add.at(*cells(change, rank, begins), size[arriving])
    np.subtract.at(*cells(change, rank, ends + 1), size[arriving])
    return int(change.cumsum(1).max(initial=0))


def crossings(plan: Plan, direction: Direction, ranks_per_node: int) -> int:
    """How often the same operand enters the same node from outside: at most; 1 where nothing crosses in vain."""
    moves = plan.schedule(direction).move_columns
    into = moves.dst // ranks_per_node
    crossing = ~moves.home & (into != moves.src // ranks_per_node)
    _, times = np.unique(into[crossing] * len(plan.blocks) + moves.block[crossing], return_counts=True)
    return int(times.max(initial=0))
