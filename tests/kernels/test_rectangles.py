from __future__ import annotations

import pytest
import torch
from support.oracle import mask_cases

from farspan.kernels import IntervalMask, masks
from farspan.kernels.rectangles import rectangles


@pytest.mark.parametrize("length", [1, 2, 16, 61])
@pytest.mark.parametrize("name", [case.name for case in mask_cases(16)])
def test_rectangles_and_rest_are_the_mask(name: str, length: int) -> None:
    case = next(case for case in mask_cases(length) if case.name == name)
    for smallest, most in ((1, length), (1, 2), (4, 8)):
        cut = rectangles(case.mask, length, smallest, most)
        times = torch.zeros(length, length, dtype=torch.int64)
        for part in cut.rectangles:
            inside = part.mask(torch.device("cpu")).visible(slice(0, length), slice(0, part.keys[1] - part.keys[0]))
            assert part.pairs == int(inside.sum())
            times[slice(*part.rows), slice(*part.keys)] += inside[0]
        if cut.rest is not None:
            times += cut.rest.visible(slice(0, length), slice(0, length))[0]
        assert torch.equal(times, case.allowed[0].long())
        if (smallest, most) == (1, length):
            assert cut.rest is None


def test_what_a_zigzag_ring_meets_is_one_rectangle() -> None:
    whole, chunk = masks.causal(64), 8
    own = [*range(8, 16), *range(48, 56)]  # chunks 1 and 6 of 8
    assert [part.causal for part in rectangles(whole.at(own, own), 16, 1).rectangles] == [True]
    earlier, later = [*range(8), *range(56, 64)], [*range(16, 24), *range(40, 48)]
    (first,) = rectangles(whole.at(own, earlier), 16, 1).rectangles
    assert (first.rows, first.keys, first.causal) == ((0, 16), (0, chunk), False)
    (second,) = rectangles(whole.at(own, later), 16, 1).rectangles
    assert (second.rows, second.keys, second.causal) == ((8, 16), (0, 16), False)


def test_packed_documents_are_causal_squares_and_windows_are_left() -> None:
    cut = rectangles(masks.causal(100, [0, 40, 60, 100]), 100, 1)
    assert [(part.rows, part.causal) for part in cut.rectangles] == [
        ((0, 40), True),
        ((40, 60), True),
        ((60, 100), True),
    ]
    window = masks.sliding_window(100, 10)
    cut = rectangles(window, 100, 15)
    assert cut.rectangles == ()
    assert cut.rest is not None
    assert cut.rest.area() == window.area()


@pytest.mark.parametrize(
    ("mask", "rows_apart", "keys_apart"),
    [
        (masks.causal(96, [0, 40, 41, 96]), True, True),
        (masks.star(96, 32, 8, [96]), False, False),
        (masks.prefix_lm(96, [40]), False, False),
        (
            IntervalMask(*(torch.tensor([[x] * 48 + [y] * 48]) for x, y in ((0, 0), (40, 50), (0, 0), (0, 0)))),
            True,
            False,
        ),
        (masks.full(96), True, True),
    ],
    ids=["documents", "star", "prefix", "two rectangles", "full"],
)
def test_whose_results_meet(mask: IntervalMask, rows_apart: bool, keys_apart: bool) -> None:
    cut = rectangles(mask, 96, 8)
    assert (cut.rows_apart, cut.keys_apart) == (rows_apart, keys_apart)


def test_keys_that_the_rest_sees_are_not_apart() -> None:
    begin, end = torch.zeros(1, 96, dtype=torch.int32), torch.full((1, 96), 40)
    end[0, 90] = 7  # a run of its own, too small to be cut out
    cut = rectangles(IntervalMask(begin, end, begin, begin), 96, 16)
    assert cut.rest is not None
    assert cut.rows_apart
    assert not cut.keys_apart
