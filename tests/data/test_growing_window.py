"""Growing windows: rows keep their tokens and labels, and are divided more coarsely step by step."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from farspan.data.growing_window import GrowingSteps, GrowingWindow, Growth, narrowed
from farspan.data.rows import Row
from farspan.data.steps import Epochs, FixedSteps

LENGTH = 100


def row() -> Row:
    tokens, bounds = np.arange(LENGTH), np.array([0, 33, 70, LENGTH])
    labels = np.where(np.isin(tokens + 1, bounds), -100, tokens + 1)
    return Row(tokens, labels, bounds, tokens - np.repeat(bounds[:-1], np.diff(bounds)), LENGTH - 3)


class One:
    length = LENGTH

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> Row:
        return row()


@pytest.mark.parametrize("width", [1, 7, 32, 33, 99, 100])
def test_windows_divide_rows_as_documents_do(width: int) -> None:
    found = narrowed(row(), width)
    assert set(found.cu_seqlens.tolist()) == {0, 33, 70, LENGTH, *range(0, LENGTH, width)}
    starts = found.cu_seqlens[np.searchsorted(found.cu_seqlens, np.arange(LENGTH), side="right") - 1]
    assert np.array_equal(found.positions, np.arange(LENGTH) - starts)
    assert np.array_equal(found.tokens, row().tokens)
    assert np.array_equal(found.labels, row().labels)  # a window's last token too has its next one
    assert found.valid == row().valid


@pytest.mark.parametrize("growth", get_args(Growth))
def test_windows_grow_from_start_to_the_whole_row(growth: Growth) -> None:
    window = GrowingWindow(32, 500, growth)
    widths = [window.width(step, 8192) for step in range(600)]
    assert widths[0] == 32
    assert set(widths[500:]) == {8192}
    assert all(one <= other for one, other in pairwise(widths))
    assert widths[499] < 8192


def test_the_published_schedule_is_a_linear_one() -> None:
    """A token more every eight steps: 32 + step / 8."""
    window = GrowingWindow(32, 8 * (8192 - 32), "linear")
    assert [window.width(step, 8192) for step in (0, 7, 8, 16000, 65280)] == [32, 32, 33, 2032, 8192]


def test_sine_is_ahead_of_linear_and_exponential_behind() -> None:
    by_growth = {growth: GrowingWindow(32, 100, growth).width(50, 8192) for growth in get_args(Growth)}
    assert by_growth["exponential"] == 512  # the geometric mean
    assert by_growth["exponential"] < by_growth["linear"] < by_growth["sine"]


def test_steps_see_the_windows_of_their_step() -> None:
    steps = GrowingSteps(FixedSteps(Epochs(One(), 0), 4), GrowingWindow(10, 9, "linear"))
    assert steps.lengths == (LENGTH,)
    for step, width in ((0, 10), (3, 40), (9, 100), (50, 100)):
        for sample in steps.samples(step):
            assert np.array_equal(steps.row(sample).cu_seqlens, narrowed(row(), width).cu_seqlens)
