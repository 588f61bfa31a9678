from __future__ import annotations

import pytest
import torch
from support.oracle import mask_cases

from farspan.kernels import IntervalMask, masks


@pytest.mark.parametrize("length", [7, 24, 61])
def test_builders_equal_their_definitions(length: int) -> None:
    for case in mask_cases(length):
        assert torch.equal(case.mask.visible(slice(0, length), slice(0, length)), case.allowed), case.name
        assert case.mask.area() == int(case.allowed.sum()), case.name


def test_overlapping_and_touching_intervals_are_fused() -> None:
    bound = lambda *values: torch.tensor([values])  # noqa: E731
    mask = IntervalMask(bound(4, 2, 5, 3), bound(8, 6, 5, 9), bound(0, 0, 1, 9), bound(4, 3, 3, 9))
    assert mask.begin.tolist() == [[0, 0, 1, 3]]
    assert mask.end.tolist() == [[8, 6, 3, 9]]
    assert mask.area() == 8 + 6 + 2 + 6


@pytest.mark.parametrize("length", [24, 37])
def test_at_gives_the_piece_in_key_slots(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    for case in mask_cases(length):
        for _ in range(5):
            rows = torch.randperm(length + 4, generator=generator)[: length // 2]
            keys = torch.randperm(length, generator=generator)[: length // 3].sort().values
            piece = case.mask.at(rows, keys)
            expected = torch.zeros(1, len(rows), len(keys), dtype=torch.bool)
            real = rows < length
            expected[:, real] = case.allowed[:, rows[real]][:, :, keys]
            assert torch.equal(piece.visible(slice(0, len(rows)), slice(0, len(keys))), expected), case.name


def test_at_refuses_unordered_keys() -> None:
    with pytest.raises(ValueError, match="ascend"):
        masks.causal(8).at([0, 1], [3, 2])


def test_kind() -> None:
    assert masks.causal(8).kind(8) == "causal"
    assert masks.full(8).kind(8) == "full"
    assert masks.causal(8).at(range(4, 8), range(8)).kind(8) == "causal"
    assert masks.causal(8).at(range(4, 8), range(4)).kind(4) == "full"
    assert masks.causal(8).at(range(4), range(4, 8)).kind(4) == "empty"
    assert masks.causal(8, [0, 3, 8]).kind(8) == "general"
    assert masks.sliding_window(8, 2, 1).kind(8) == "general"


def test_intersection() -> None:
    both = masks.sliding_window(20, 4, 2) & masks.causal(20, [0, 7, 20])
    expected = masks.sliding_window(20, 4, 2).visible(slice(0, 20), slice(0, 20))
    expected &= masks.causal(20, [0, 7, 20]).visible(slice(0, 20), slice(0, 20))
    assert torch.equal(both.visible(slice(0, 20), slice(0, 20)), expected)
    with pytest.raises(ValueError, match="may need four"):
        masks.sliding_window(20, 4, 2) & masks.sliding_window(20, 4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.causal(8, [0, 5]), "ascend from 0 to 8"),
        (lambda: masks.causal(8, [0, 6, 4, 8]), "ascend from 0 to 8"),
        (lambda: masks.sliding_window(8, 0), "width >= 1"),
        (lambda: masks.star(8, 0, 1, [8]), "block >= 1"),
        (lambda: masks.prefix_lm(8, [1], [0, 4, 8]), "1 entries for 2 documents"),
        (lambda: masks.shared_question(8, [[4, 3]]), "add up to 7"),
    ],
)
def test_impossible_masks_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
