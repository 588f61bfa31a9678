"""Expected time of one call of a backend: its measured rate, and the memory that moves because calls add up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from farspan.kernels.masks import IntervalMask
from farspan.kernels.problem import Problem
from farspan.kernels.rates import Kind, Rates
from farspan.kernels.rectangles import Rectangle
from farspan.kernels.tiles import TileMap

# Launches on the host, and a first wave that waits for memory.
_CALL_SECONDS = 30e-6
# What passes over whole tensors reach on an H200, whose data sheet says 4.8e12 bytes a second.
_MEMORY = 4e12
# Bytes an element to add a result to an fp32 total, beyond writing it in bf16 once. Our kernels read the total and
# write 4 bytes in place of 2; a library's result is read again, and the total read and written.
_ADD_IN_KERNEL = 4 + 4 - 2
_ADD_AFTERWARDS = 2 + 4 + 4
# A result that is copied to its place among others, in bf16.
_PLACE = 2 + 2
# A total that only one call of `attend` needs is filled with zeros, and read to be written in bf16.
_TOTAL = 4 + 4 + 2

# What becomes of a call's results: they are what is asked for, are copied to their place in it, or added to totals.
Results = Literal["make", "place", "add"]


@dataclass(frozen=True)
class Work:
    """One call: what its mask is to a kernel, its rows and keys, and the visible pairs of the whole batch.

    `length` is where to look it up in a table of rates: the side of a square; for lists the length of causal documents
    whose rows see as many keys.
    """

    kind: Kind
    rows: int
    keys: int
    pairs: int
    length: float

    @staticmethod
    def of_mask(mask: IntervalMask, problem: Problem) -> Work:
        tiles = TileMap.of(mask, problem.keys)
        pairs = tiles.pairs * (problem.batch // mask.batch)
        if tiles.offset is None:
            seeing = int((mask.end > mask.begin).sum())
            return Work("lists", mask.rows, problem.keys, pairs, 2 * tiles.pairs / max(1, seeing))
        kind: Kind = "full" if tiles.offset == problem.keys else "causal"
        return Work(kind, mask.rows, problem.keys, pairs, math.sqrt(mask.rows * problem.keys))

    @staticmethod
    def of_rectangle(part: Rectangle, problem: Problem) -> Work:
        rows, keys = part.rows[1] - part.rows[0], part.keys[1] - part.keys[0]
        kind: Kind = "causal" if part.causal else "full"
        return Work(kind, rows, keys, part.pairs * problem.batch, math.sqrt(rows * keys))


def call_seconds(table: Rates, problem: Problem, backend: str, work: Work, results: Results) -> float:
    """Seconds of one call and of what becomes of its results; infinite if it was not measured."""
    rate = table.rate(backend, work.kind, problem.backward, work.length, problem.head_dim)
    if rate == 0:
        return math.inf
    of_keys, of_values = (3, 2) if problem.backward else (1, 1)  # matrix products by their inner or outer dim
    products = of_keys * problem.head_dim + of_values * problem.value_dim
    compute = 2 * products * problem.heads * work.pairs / (rate * 1e12)
    add = _ADD_IN_KERNEL if backend == "triton" else _ADD_AFTERWARDS
    bytes_ = {"make": 0, "place": _PLACE, "add": add}[results] * problem.results(work.rows, work.keys)
    return _CALL_SECONDS + compute + bytes_ / _MEMORY


def totals_seconds(problem: Problem, rows: int) -> float:
    """Seconds to make fp32 totals for all results, and to write them in the dtype of q."""
    return _TOTAL * problem.results(rows, problem.keys) / _MEMORY
