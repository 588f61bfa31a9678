"""The loss law under Star Attention: loss and all gradients are those of one rank, for hand-made rows of both modes."""

from __future__ import annotations

from typing import Any

import pytest
from support.pool import Pool
from support.step import Layout, rows, step

pytestmark = pytest.mark.distributed

ALONE: list[Layout] = [("single", "contiguous", {})]
LAYOUTS: list[Layout] = [
    ("star", "two_class", {}),
    ("ring", "zigzag", {}),
    ("ring", "two_class", {}),
    ("all_gather", "striped", {}),
]


def attention(mode: str) -> dict[str, Any]:
    return {"star": {"block": 8, "anchor": 5, "mode": mode}}


@pytest.mark.parametrize("mode", ["lm", "sft"])
def test_loss_and_gradients_are_those_of_one_rank(pool: Pool, mode: str) -> None:
    ((alone,),) = pool.run(1, step, attention(mode), mode, ALONE)
    assert all(float(gradient.abs().max()) > 0 for gradient in alone.values())
    for world in (2, 4):
        results = pool.run(world, step, attention(mode), mode, LAYOUTS)[0]
        for layout, found in zip(LAYOUTS, results, strict=True):
            for name, wanted in alone.items():
                difference = float((found[name] - wanted).abs().max() / wanted.abs().max())
                assert difference < 1e-9, (world, layout, name, difference)


def test_answers_teach_the_context(pool: Pool) -> None:
    """Tokens of the context alone have no label, and still the embedding of one that is seen nowhere else learns."""
    ((alone,),) = pool.run(1, step, attention("sft"), "sft", ALONE)
    made = rows("sft")
    in_context = set(made[1].tokens[:41].tolist())
    elsewhere = {*made[0].tokens.tolist(), *made[1].tokens[41:].tolist()}
    only = sorted(in_context - elsewhere)
    assert only
    assert bool((alone["embedding.weight"][only].abs().amax(1) > 0).all())
