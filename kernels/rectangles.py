"""Cutting a mask into full and causal rectangles, which library kernels can compute."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from farspan.kernels import masks
from farspan.kernels.masks import IntervalMask
from farspan.kernels.tiles import TileMap


@dataclass(frozen=True)
class Rectangle:
    """Rows `[rows[0], rows[1])` over keys `[keys[0], keys[1])`: full, or causal with as many rows as keys."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool

    @property
    def pairs(self) -> int:
        rows, keys = self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]
        return rows * (rows + 1) // 2 if self.causal else rows * keys

    def mask(self, device: torch.device) -> IntervalMask:
        rows, keys = self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]
        if self.causal:
            mask = masks.causal(rows)
        else:
            begin = torch.zeros(1, rows, dtype=torch.int32)
            mask = IntervalMask(begin, begin + keys, begin, begin)
        return mask.to(device)


@dataclass(frozen=True)
class Cut:
    """Disjoint rectangles, and a mask of what they leave, None if that is nothing.

    `rows_apart`: no row is in two rectangles, nor in one and seeing in the rest; `keys_apart`: the same of keys.
    """

    rectangles: tuple[Rectangle, ...]
    rest: IntervalMask | None
    rows_apart: bool
    keys_apart: bool


def rectangles(mask: IntervalMask, keys: int, smallest: int = 1024, most: int = 8) -> Cut:
    """The runs of rows whose intervals stay, or whose end moves one key a row, as rectangles; the rest as a mask.

    Of several runs those of at least `smallest` squared pairs count, and of these the `most` largest: a call has its
    costs, so windows, whose every row is a run of its own, and many small documents are left to other kernels. A batch
    whose masks may differ is left whole.
    """
    name = f"rectangles of {keys} by {smallest}, {most}"
    if name not in mask.derived:
        mask.derived[name] = _cut(mask, keys, smallest, most)
    cut: Cut = mask.derived[name]
    return cut


def _cut(mask: IntervalMask, keys: int, smallest: int, most: int) -> Cut:
    if mask.batch > 1 and TileMap.of(mask, keys).offset is None:
        return Cut((), mask, True, True)
    bounds = [bound[0].cpu().numpy().astype(np.int64) for bound in mask.bounds]
    seen = np.cumsum(np.concatenate([[0], bounds[1] - bounds[0] + bounds[3] - bounds[2]]))
    runs = _runs(bounds)
    large = [run for run in runs if len(runs) == 1 or seen[run[1]] - seen[run[0]] >= smallest**2]
    largest = sorted(large, key=lambda run: seen[run[0]] - seen[run[1]])[:most]
    chosen = tuple(part for first, stop in sorted(largest) for part in _of_run(first, stop, bounds))
    covered = torch.zeros(mask.rows, dtype=torch.bool)
    for part in chosen:
        covered[slice(*part.rows)] = True
    left = ~covered.to(mask.device)
    rest = IntervalMask(*(bound * left for bound in mask.bounds))
    begin, end, anchor_begin, anchor_end = (bound * ~covered.numpy() for bound in bounds)
    seen_by_rest = [
        _overlaps(begin, end, part.keys) or _overlaps(anchor_begin, anchor_end, part.keys) for part in chosen
    ]
    return Cut(
        chosen,
        None if rest.kind(keys) == "empty" else rest,
        rows_apart=_apart([part.rows for part in chosen]),
        keys_apart=_apart([part.keys for part in chosen]) and not any(seen_by_rest),
    )


def _apart(spans: list[tuple[int, int]]) -> bool:
    return all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))


def _overlaps(begin: np.ndarray, end: np.ndarray, span: tuple[int, int]) -> bool:
    return bool(((begin < end) & (begin < span[1]) & (end > span[0])).any())


def _runs(bounds: list[np.ndarray]) -> list[tuple[int, int]]:
    """Longest runs of rows in which only the end moves, by the same 0 or 1 from row to row."""
    begin, end, anchor_begin, anchor_end = bounds
    rows = len(begin)
    step = np.diff(end)
    same = (np.diff(begin) == 0) & (np.diff(anchor_begin) == 0) & (np.diff(anchor_end) == 0) & (step >= 0) & (step <= 1)
    runs = []
    first = 0
    # A run ends where a step is of another kind than the one before it; a step that fits nothing stands alone.
    kind = np.where(same, step, -1)
    breaks = np.flatnonzero(np.diff(kind, prepend=-2))
    for at, stop in pairwise([*breaks.tolist(), rows - 1]):
        if kind[at] < 0:
            continue
        # Steps at .. stop - 1 join the rows at .. stop; the first of them may belong to the run before.
        top = max(first, at)
        runs += [(row, row + 1) for row in range(first, top)]
        runs.append((top, stop + 1))
        first = stop + 1
    return runs + [(row, row + 1) for row in range(first, rows)]


def _of_run(first: int, stop: int, bounds: list[np.ndarray]) -> list[Rectangle]:
    begin, end, anchor_begin, anchor_end = (int(bound[first]) for bound in bounds)
    parts = []
    if anchor_end > anchor_begin:
        parts.append(Rectangle((first, stop), (anchor_begin, anchor_end), False))
    if stop - first == 1 or bounds[1][first + 1] == end:
        parts.append(Rectangle((first, stop), (begin, end), False))
    elif end == begin:  # the first row sees nothing yet
        parts.append(Rectangle((first + 1, stop), (begin, begin + stop - first - 1), True))
    else:
        parts.append(Rectangle((first, stop), (begin, end - 1), False))
        parts.append(Rectangle((first, stop), (end - 1, end - 1 + stop - first), True))
    return [part for part in parts if part.keys[1] > part.keys[0]]
