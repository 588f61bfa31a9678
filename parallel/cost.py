"""What a plan is expected to take: each piece at the measured rate of its kind, and the choice of a plan by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from farspan.kernels.backends import CHOICES, REGISTRY
from farspan.kernels.cost import Work, call_seconds, totals_seconds
from farspan.kernels.problem import Problem
from farspan.kernels.rates import Kind, of_capability
from farspan.kernels.tiles import TILE
from farspan.parallel.columns import cells
from farspan.parallel.orders import Order
from farspan.parallel.pairs import VisiblePairs
from farspan.parallel.plan import Direction, Plan


class NoRatesError(LookupError):
    """A piece of work that no backend was measured on."""


def compute_seconds(
    plan: Plan,
    direction: Direction,
    order: Order,
    visible: VisiblePairs,
    tensors: Problem,
    backend: str,
    density: float = 1.0,
) -> np.ndarray:
    """Seconds that each rank computes at each stage, `[world, stages]`, by the measured rates of `kernels.rates`.

    `tensors` has the batch, head dims and GPU; `backend` is as in `attend`. Each piece goes to the backend that is
    expected to be the fastest. NoRatesError where none of those allowed was measured.

    Under a sparse index kernels compute the share `density` of the visible pairs. It is taken to be spread evenly over
    all pieces, as striped order does, and its rate to be that of packed documents whose rows see as many keys.
    """
    schedule, backward = plan.schedule(direction), direction == "backward"
    pieces = schedule.piece_columns
    owner = np.array([block.owner for block in plan.blocks], np.int64)
    tokens = np.array([(block.positions(order) < order.length).sum() for block in plan.blocks], np.int64)
    heads = np.array([block.heads[1] - block.heads[0] for block in plan.blocks], np.int64)
    rows, keys, pairs, foreign = (np.zeros(len(schedule.pieces), np.int64) for _ in range(4))
    np.add.at(rows, pieces.q.pieces, tokens[pieces.q.blocks])
    np.add.at(keys, pieces.kv.pieces, tokens[pieces.kv.blocks])
    np.add.at(foreign, pieces.q.pieces, owner[pieces.q.blocks] != pieces.rank[pieces.q.pieces])
    piece, q, kv = pieces.pairs()
    np.add.at(pairs, piece, visible.of(q, kv))
    if density < 1:
        pairs = np.rint(density * pairs).astype(np.int64)
        tensors = replace(tensors, index_block=TILE)
    first_q, first_kv = (uses.blocks[uses.counts.cumsum() - uses.counts] for uses in (pieces.q, pieces.kv))
    columns = (rows, keys, pairs, np.minimum(foreign, 1), heads[first_q], heads[first_kv])

    kinds, kind = _distinct(columns)
    sole = plan.world == 1 and len(schedule.pieces) == 1
    seconds = np.zeros(len(kinds))
    for index, (n_rows, n_keys, n_pairs, travels, n_heads, n_kv_heads) in enumerate(kinds.tolist()):
        problem = replace(
            tensors,
            keys=n_keys,
            heads=n_heads,
            kv_heads=n_kv_heads,
            backward=backward,
            accumulate=not sole,
            out_given=not (backward and travels),
        )
        seconds[index] = _fastest(problem, _work(n_rows, n_keys, n_pairs, tensors.batch, visible.batch), backend)
    total = np.zeros((plan.world, schedule.stages))
    np.add.at(*cells(total, pieces.rank, pieces.stage), seconds[kind])
    if not sole and schedule.stages:
        # fp32 totals of a rank's own tensors are made and cast once.
        own = replace(tensors, keys=order.slots, heads=plan.heads[0], kv_heads=plan.heads[1], backward=backward)
        total[:, 0] += totals_seconds(own, order.slots)
    return total


def _distinct(columns: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a table that differ, and which of them each row is: fast for a long table of few kinds."""
    stacked = np.stack(list(columns), 1)
    number = np.zeros(len(stacked), np.int64)
    for column in stacked.T:
        values, inverse = np.unique(column, return_inverse=True)
        number = np.unique(number * max(1, len(values)) + inverse, return_inverse=True)[1]
    _, first = np.unique(number, return_index=True)
    return stacked[first], number


def _work(rows: int, keys: int, pairs: int, batch: int, mask_batch: int) -> Work:
    """What a piece is to a kernel, judged by how many of its pairs are visible in the `mask_batch` rows of the mask."""
    kind: Kind = "lists"
    if pairs == mask_batch * rows * keys:
        kind = "full"
    elif rows <= keys and pairs == mask_batch * (rows * keys - rows * (rows - 1) // 2):
        kind = "causal"
    length = 2 * pairs / max(1, mask_batch * rows) if kind == "lists" else math.sqrt(rows * keys)
    return Work(kind, rows, keys, pairs * batch // mask_batch, length)


def _fastest(problem: Problem, work: Work, backend: str) -> float:
    if not work.pairs:
        return 0.0
    assert problem.capability is not None
    names = [backend]
    if backend in CHOICES:
        names = [name for name, one in REGISTRY.items() if one.refusal(problem) is None]
        if backend == "deterministic" and problem.backward:
            names = [name for name in names if REGISTRY[name].deterministic]
    if work.kind == "lists":
        names = [name for name in names if REGISTRY[name].any_mask]
    table = of_capability(problem.capability)
    seconds = min(
        (call_seconds(table, problem, name, work, "add" if problem.accumulate else "make") for name in names),
        default=math.inf,
    )
    if math.isinf(seconds):
        raise NoRatesError(
            f"attention.backend {backend} was not measured on {table.device} for pieces that are {work.kind}"
        )
    return seconds


def choose(candidates: Iterable[Plan], seconds: Callable[[Plan], float]) -> tuple[Plan, dict[str, float]]:
    """The plan that is expected to be the fastest, the first of equals; and the seconds of each, by name."""
    best: Plan | None = None
    found: dict[str, float] = {}
    for plan in candidates:
        found[plan.name] = seconds(plan)
        if best is None or found[plan.name] < found[best.name]:
            best = plan
    if best is None:
        raise ValueError("there is no plan to choose from")
    return best, found
