"""The time of pieces by the measured rates, and the choice by it."""

from __future__ import annotations

import pytest
import torch

from farspan.kernels import masks
from farspan.kernels.problem import Problem
from farspan.kernels.rates import of_capability
from farspan.parallel import orders, plans
from farspan.parallel.cost import NoRatesError, choose, compute_seconds
from farspan.parallel.plan import DIRECTIONS, Direction
from farspan.parallel.verify import verify

HOPPER = Problem(1, 0, 0, 0, 128, 128, torch.bfloat16, (9, 0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_rank_takes_what_its_rate_says(direction: Direction) -> None:
    length = 32768
    order, mask = orders.contiguous(length, 1), masks.causal(length)
    plan = plans.build("single", order, mask, (32, 8))
    visible = verify(plan, order, mask).visible
    seconds = compute_seconds(plan, direction, order, visible, HOPPER, "triton")
    rate = of_capability((9, 0)).rate("triton", "causal", direction == "backward", length, 128)
    flops = {"forward": 4, "backward": 10}[direction] * 128 * 32 * length * (length + 1) / 2
    assert seconds.sum() == pytest.approx(flops / rate / 1e12 + 30e-6, rel=1e-6)


def test_a_balanced_order_takes_half_the_time_on_two_ranks() -> None:
    length, one = 131072, {}
    for world, name in ((1, "single"), (2, "ring")):
        order, mask = orders.zigzag(length, world), masks.causal(length)
        plan = plans.build(name, order, mask, (32, 8))
        visible = verify(plan, order, mask).visible
        one[world] = compute_seconds(plan, "forward", order, visible, HOPPER, "deterministic").sum(1).max()
    assert one[2] == pytest.approx(one[1] / 2, rel=0.1)


def test_pieces_are_recognised_with_padding_and_with_documents() -> None:
    """A rank whose last slots are padding computes full and causal rectangles, too; documents are lists."""
    order = orders.zigzag(8190, 2)
    whole = masks.causal(8190)
    packed = masks.causal(8190, [0, 4095, 8190])
    seconds = {}
    for mask in (whole, packed):
        plan = plans.ring(order, mask, (32, 8))
        visible = verify(plan, order, mask).visible
        seconds[mask] = compute_seconds(plan, "forward", order, visible, HOPPER, "triton").sum()
        if mask is whole:
            assert compute_seconds(plan, "forward", order, visible, HOPPER, "cudnn").sum() > 0
            continue
        with pytest.raises(NoRatesError, match=r"attention\.backend cudnn was not measured .* pieces that are lists"):
            compute_seconds(plan, "forward", order, visible, HOPPER, "cudnn")
    assert seconds[packed] < seconds[whole]


def test_the_fastest_is_chosen_and_the_first_of_equals() -> None:
    order, mask = orders.zigzag(64, 4), masks.causal(64)
    candidates = [plans.build(name, order, mask, (4, 2)) for name in ("ring", "all_gather")]
    best, seconds = choose(candidates, lambda plan: {"ring": 2.0, "all_gather": 1.0}[plan.name])
    assert (best.name, seconds) == ("all_gather", {"ring": 2.0, "all_gather": 1.0})
    assert choose(candidates, lambda plan: 1.0)[0].name == "ring"
    with pytest.raises(ValueError, match="no plan to choose"):
        choose([], lambda plan: 1.0)
