"""A growing window over packed rows (SkyLadder, arXiv:2503.15450): training sees short texts first, then long ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from farspan.data.rows import Row
from farspan.data.steps import FixedSteps

Growth = Literal["linear", "sine", "exponential"]


@dataclass(frozen=True)
class GrowingWindow:
    """Tokens see each other inside consecutive windows of a row only; these grow from `start` tokens to the whole row.

    `steps` is the number of steps after which the row is one window; `growth` the way there: by equally many tokens a
    step, fast and then slowly (a quarter of a sine wave), or by an equal factor a step.
    """

    start: int
    steps: int
    growth: Growth

    def width(self, step: int, length: int) -> int:
        """Tokens of a window in a step (from 0) with rows of `length` tokens."""
        if step >= self.steps or self.start >= length:
            return length
        done = step / self.steps
        if self.growth == "exponential":
            return int(self.start * (length / self.start) ** done)
        share = math.sin(math.pi / 2 * done) if self.growth == "sine" else done
        return int(self.start + (length - self.start) * share)


@dataclass(frozen=True)
class GrowingSteps:
    """Steps whose rows are cut into the windows of their step, beside what divides them already."""

    steps: FixedSteps
    window: GrowingWindow

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.steps.lengths

    def length(self, step: int) -> int:
        return self.steps.length(step)

    def samples(self, step: int) -> Sequence[int]:
        return self.steps.samples(step)

    def row(self, sample: int) -> Row:
        step = sample // self.steps.rows_per_step
        return narrowed(self.steps.row(sample), self.window.width(step, self.length(step)))


def narrowed(row: Row, width: int) -> Row:
    """A row whose documents end also wherever `width` tokens are full. No label is lost: a window's last token has its
    true next one."""
    length = len(row.tokens)
    bounds = np.union1d(row.cu_seqlens, np.arange(0, length, width))
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    return replace(row, cu_seqlens=bounds, positions=np.arange(length) - starts, contexts=None)
