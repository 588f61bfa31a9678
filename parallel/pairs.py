"""How many pairs of rows and keys a mask lets through between any two blocks of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Plan, PlanError

Span = tuple[str, int, tuple[int, int]]  # the side, owner and slots of a block


@dataclass(frozen=True, eq=False)
class VisiblePairs:
    """Visible pairs of one query head between all blocks of rows and all blocks of keys, whatever pieces a plan holds.

    Blocks with the same owner and slots differ in heads only, and share a span: `span` int64 `[blocks]` counts spans
    for each side by itself, and `area` int64 `[spans of rows, spans of keys]` is summed over the `batch` rows of the
    mask.
    """

    span: np.ndarray
    area: np.ndarray
    batch: int

    def of(self, q: np.ndarray, kv: np.ndarray) -> np.ndarray:
        """int64: the pairs of each block of rows in `q`, by index, with the block of keys beside it in `kv`."""
        return self.area[self.span[q], self.span[kv]]


def visible_pairs(plan: Plan, order: Order, mask: IntervalMask) -> VisiblePairs:
    """PlanError unless every token is in exactly one span of keys.

    For one span of rows, the pairs with keys below x are a sum over rows of x - begin where begin < x, less the same
    for ends. Its differences between the bounds of runs of keys are the areas. Written apart from the builders' own
    geometry. Cost: rows + pairs of spans.
    """
    spans: dict[str, dict[Span, int]] = {"q": {}, "kv": {}}
    span = np.empty(len(plan.blocks), np.int64)
    for index, block in enumerate(plan.blocks):
        known = spans[block.side]
        span[index] = known.setdefault((block.side, block.owner, block.slots), len(known))

    keys = [_positions(order, one) for one in spans["kv"]]
    edges, holder = _key_runs(keys, order.length)
    bounds = [bound.cpu().numpy().astype(np.int64) for bound in mask.bounds]
    area = np.zeros((len(spans["q"]), len(keys)), np.int64)
    for counts, one in zip(area, spans["q"]):
        rows = _positions(order, one)
        begin, end, anchor_begin, anchor_end = (bound[:, rows].ravel() for bound in bounds)
        below = _sum_below(np.concatenate([begin, anchor_begin]), edges)
        below -= _sum_below(np.concatenate([end, anchor_end]), edges)
        np.add.at(counts, holder, np.diff(below))
    return VisiblePairs(span, area, mask.batch)


def _positions(order: Order, span: Span) -> np.ndarray:
    _, owner, slots = span
    positions = order.positions[owner][slice(*slots)]
    return positions[positions < order.length]


def _key_runs(spans: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts [0, length) where the holder of the keys changes: edges `[runs + 1]` and the holding span of each run."""
    holder = np.full(length, -1, np.int64)
    for number, positions in enumerate(spans):
        if (holder[positions] != -1).any():
            raise PlanError("two blocks of keys hold the same token")
        holder[positions] = number
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
