"""Which rows need which keys: the geometry under every plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block

Intervals = tuple[np.ndarray, np.ndarray]


def need(order: Order, mask: IntervalMask, q: Sequence[Block], kv: Sequence[Block]) -> np.ndarray:
    """Boolean `[len(q), len(kv)]`: whether some row of the block sees some key of the block. Heads are not looked at.

    Intervals of positions, never a dense mask: the cost is that of the bounds and of the runs of the orders.
    """
    key_runs = [_runs(block.positions(order), order.length) for block in kv]
    begins = np.concatenate([begin for begin, _ in key_runs])
    ends = np.concatenate([end for _, end in key_runs])
    of_run = np.repeat(np.arange(len(kv)), [len(begin) for begin, _ in key_runs])
    needed = np.zeros((len(q), len(kv)), bool)
    bounds = [bound.cpu().numpy() for bound in mask.bounds]
    for row, block in enumerate(q):
        low, high = _union(bounds, block.positions(order))
        # The first interval that ends behind a run's begin is the only one that can reach the run first.
        at = np.searchsorted(high, begins, "right")
        inside = at < len(low)
        hit = inside.copy()
        hit[inside] = low[at[inside]] < ends[inside]
        needed[row, of_run[hit]] = True
    return needed


class Wanted(NamedTuple):
    """A run of one rank's slots, and the other ranks with rows that see something of it: the same for all its slots."""

    slots: tuple[int, int]
    ranks: tuple[int, ...]


def wanted(order: Order, mask: IntervalMask, rows: Sequence[np.ndarray]) -> list[list[Wanted]]:
    """By owner, its slots in runs, for the rows of each rank at the positions `rows[rank]`."""
    bounds = [bound.cpu().numpy() for bound in mask.bounds]
    seen = [_union(bounds, positions) for positions in rows]
    low, high = (np.concatenate([pair[side] for pair in seen]) for side in (0, 1))
    reader = np.repeat(np.arange(order.world), [len(pair[0]) for pair in seen])
    found = []
    for owner, positions in enumerate(order.positions):
        first, stop = np.searchsorted(positions, low), np.searchsorted(positions, high)
        real = (first < stop) & (reader != owner)
        edges, at = np.unique(np.concatenate([first[real], stop[real], [0, order.slots]]), return_inverse=True)
        begins, ends = np.split(at[:-2], 2)
        readers, of_reader = np.unique(reader[real], return_inverse=True)
        change = np.zeros((len(readers), len(edges)), np.int32)
        np.add.at(change, (of_reader, begins), 1)
        np.add.at(change, (of_reader, ends), -1)
        reads = change.cumsum(1)[:, :-1] > 0
        cut = np.flatnonzero((reads[:, 1:] != reads[:, :-1]).any(0)) + 1
        starts = np.concatenate([[0], cut])
        stops = np.concatenate([edges[cut], [order.slots]])
        found.append(
            [
                Wanted((int(edges[start]), int(stop)), tuple(readers[reads[:, start]].tolist()))
                for start, stop in zip(starts, stops)
            ]
        )
    return found


def _union(bounds: list[np.ndarray], positions: np.ndarray) -> Intervals:
    """What the rows at `positions` see together: disjoint intervals, ascending."""
    rows = positions[positions < bounds[0].shape[1]]
    begin, end, anchor_begin, anchor_end = (bound[:, rows].ravel() for bound in bounds)
    low, high = np.concatenate([begin, anchor_begin]), np.concatenate([end, anchor_end])
    low, high = low[high > low], high[high > low]
    if not len(low):
        return low, high
    ascending = np.argsort(low, kind="stable")
    low, reach = low[ascending], np.maximum.accumulate(high[ascending])
    first = np.concatenate([[True], low[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return low[first], reach[last]


def _runs(positions: np.ndarray, length: int) -> Intervals:
    """The real positions of a block as runs of consecutive ones."""
    real = positions[positions < length]
    cuts = np.flatnonzero(np.diff(real) != 1)
    if not len(real):
        return real, real
    return real[np.concatenate([[0], cuts + 1])], real[np.concatenate([cuts, [len(real) - 1]])] + 1
