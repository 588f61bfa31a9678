"""Which backend computes what of a mask: parts, each one call of one backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.kernels import rates
from farspan.kernels.backends import BACKENDS, CHOICES, REGISTRY
from farspan.kernels.cost import Results, Work, call_seconds, totals_seconds
from farspan.kernels.masks import IntervalMask
from farspan.kernels.problem import Problem
from farspan.kernels.rectangles import Cut, Rectangle, rectangles
from farspan.kernels.tiles import TILE

# A mask that takes more calls of a library than this is not one for a library.
_MOST_CALLS = 64
# Rates differ by some per cent from run to run: several calls must be expected to save more than that over one.
_SEVERAL_CALLS = 0.95


@dataclass(frozen=True, eq=False)
class Part:
    """One call: the rows and keys that it takes, and the mask between them."""

    backend: str
    rows: slice
    keys: slice
    mask: IntervalMask


@dataclass(frozen=True, eq=False)
class Choice:
    """The calls that make up one attention. With `apart` no two write one result; the first may span all results."""

    parts: tuple[Part, ...]
    apart: bool


def choose(problem: Problem, mask: IntervalMask, backend: str) -> Choice:
    """Worked out once a mask, then remembered by it.

    ValueError, naming the key to change, when the backend cannot compute the mask.
    """
    name = f"choice of {backend} for {problem}"
    if name not in mask.derived:
        mask.derived[name] = (
            _fastest(problem, mask, backend == "deterministic") if backend in CHOICES else _by(backend, problem, mask)
        )
    found: Choice = mask.derived[name]
    return found


def in_words(calls: Sequence[Part]) -> str:
    """Such as "triton", or "2 cudnn + triton" for three calls."""
    counts = Counter(part.backend for part in calls)
    return " + ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())


def check_backend(problem: Problem, backend: str) -> None:
    """ValueError, naming the key to change, when a backend cannot compute such a problem, whatever the mask."""
    if backend not in BACKENDS:
        raise ValueError(f"attention.backend is {backend!r}; possible are {', '.join(BACKENDS)}")
    refusal = None if backend in CHOICES else REGISTRY[backend].refusal(problem)
    if refusal is not None:
        raise ValueError(f"attention.backend is {backend!r}, but {refusal}; set it to auto")


def _by(backend: str, problem: Problem, mask: IntervalMask) -> Choice:
    check_backend(problem, backend)
    if REGISTRY[backend].any_mask:
        return Choice((_whole(mask, problem, backend),), apart=True)
    cut = rectangles(mask, problem.keys, smallest=1, most=_MOST_CALLS)
    if cut.rest is not None:
        raise ValueError(
            f"attention.backend is {backend!r}, which computes full and causal rectangles, and this mask is not "
            f"{_MOST_CALLS} or fewer of them; set it to auto or triton"
        )
    return Choice(tuple(_rectangle(part, mask, backend) for part in cut.rectangles), _apart(cut, problem))


def _fastest(problem: Problem, mask: IntervalMask, deterministic: bool) -> Choice:
    """The whole mask in one call, or its rectangles each by the backend that is best at it: what takes less time."""
    able = [name for name, backend in REGISTRY.items() if backend.refusal(problem) is None]
    if deterministic and problem.backward:
        able = [name for name in able if REGISTRY[name].deterministic]
    if problem.sparse and "triton" in able:
        return Choice((_whole(mask, problem, "triton"),), apart=True)
    if problem.capability is None or "triton" not in able:
        return Choice((_whole(mask, problem, "reference"),), apart=True)
    table = rates.of_capability(problem.capability)
    measured = [name for name in able if name in table.backends]
    make: Results = "add" if problem.accumulate else "make"
    whole = Choice((_whole(mask, problem, "triton"),), apart=True)
    whole_seconds = call_seconds(table, problem, "triton", Work.of_mask(mask, problem), make)

    cut = rectangles(mask, problem.keys)
    apart = _apart(cut, problem)
    sole = [_is_all(part, problem, mask) for part in cut.rectangles] == [True]
    add: Results = make if sole else "place" if apart and not problem.accumulate else "add"
    seconds = totals_seconds(problem, mask.rows) if add == "add" and not problem.accumulate else 0.0
    pieces: list[Part] = []
    if cut.rest is not None:
        pieces.append(_whole(cut.rest, problem, "triton"))
        first = "make" if add == "place" else add
        seconds += call_seconds(table, problem, "triton", Work.of_mask(cut.rest, problem), first)
    for part in cut.rectangles:
        work = Work.of_rectangle(part, problem)
        returns = sole or _in_tiles(part)
        fit = [name for name in measured if returns or not REGISTRY[name].plans_shapes]
        cost = {name: call_seconds(table, problem, name, work, add) for name in fit}
        best = min(cost, key=lambda name: cost[name])
        pieces.append(_rectangle(part, mask, best))
        seconds += cost[best]
    worth = 1.0 if len(pieces) == 1 else _SEVERAL_CALLS
    return Choice(tuple(pieces), apart) if pieces and seconds < worth * whole_seconds else whole


def _apart(cut: Cut, problem: Problem) -> bool:
    return cut.rows_apart and (cut.keys_apart or not problem.backward)


def _in_tiles(part: Rectangle) -> bool:
    """Whether its shape may come again, as those that documents cut hardly ever do."""
    return all((stop - start) % TILE == 0 for start, stop in (part.rows, part.keys))


def _is_all(part: Rectangle, problem: Problem, mask: IntervalMask) -> bool:
    """Whether a call over the rectangle writes all results."""
    return part.rows == (0, mask.rows) and (not problem.backward or part.keys == (0, problem.keys))


def _whole(mask: IntervalMask, problem: Problem, backend: str) -> Part:
    return Part(backend, slice(0, mask.rows), slice(0, problem.keys), mask)


def _rectangle(part: Rectangle, mask: IntervalMask, backend: str) -> Part:
    return Part(backend, slice(*part.rows), slice(*part.keys), part.mask(mask.device))
