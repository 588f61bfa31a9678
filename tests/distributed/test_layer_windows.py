"""The loss law with windows between full layers: under every plan loss and all gradients are those of one rank."""

from __future__ import annotations

from typing import Any

import pytest
from support.plan_cases import plan_cases
from support.pool import Pool
from support.step import Layout, step

pytestmark = pytest.mark.distributed

ALONE: list[Layout] = [("single", "contiguous", {})]
WINDOW = {"width": 9, "full_layers": [1]}
STAR = {"block": 8, "anchor": 5, "global_fraction": 0.3}


def layouts(world: int, orders: tuple[str, ...]) -> list[Layout]:
    """Every plan, over the orders in turn; plan star goes by two_class alone, so not without Star Attention."""
    cases = [case for case in plan_cases(world) if case.plan != "star"]
    found: list[Layout] = []
    for number, (name, topology) in enumerate(cases):
        keys = {"inner": topology.inner, "ulysses": topology.ulysses}
        given = {key: value for key, value in keys.items() if value is not None}
        found.append((name, orders[number % len(orders)], given))
    return found


def check(pool: Pool, attention: dict[str, Any], world: int, layouts: list[Layout]) -> None:
    ((alone,),) = pool.run(1, step, attention, "lm", ALONE)
    for layout, found in zip(layouts, pool.run(world, step, attention, "lm", layouts)[0], strict=True):
        for name, wanted in alone.items():
            difference = float((found[name] - wanted).abs().max() / wanted.abs().max())
            assert difference < 1e-9, (world, layout, name, difference)


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_are_those_of_one_rank(pool: Pool, world: int) -> None:
    check(pool, {"window": WINDOW}, world, layouts(world, ("zigzag", "striped", "contiguous")))


@pytest.mark.parametrize("world", [2, 4])
def test_windows_between_layers_of_star_attention(pool: Pool, world: int) -> None:
    """Over the order of the star's global rows, whose windows are no different from those of other rows."""
    chosen = [("star", "two_class", {}), *layouts(world, ("two_class",))[:3]]
    check(pool, {"window": {**WINDOW, "sinks": 2}, "star": STAR}, world, chosen)


def test_every_key_counts(pool: Pool) -> None:
    """Each changes the loss."""
    losses = set()
    for changes in ({}, {"width": 4}, {"sinks": 2}, {"full_layers": [2]}, {"full_layers": []}):
        ((alone,),) = pool.run(1, step, {"window": {**WINDOW, **changes}}, "lm", ALONE)
        losses.add(float(alone["loss"]))
    assert len(losses) == 5
