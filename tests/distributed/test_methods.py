"""Training on packed, padded, windowed and blended rows: losses and what is blended do not depend on the ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.corpus import prepare_small
from support.pool import Pool
from support.training import small_model, train_runs

from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

METHODS: dict[str, dict[str, Any]] = {
    "best_fit": {"method": "best_fit", "overlong": "truncate"},
    "padded": {"method": "padded"},
    "window": {"growing_window": {"start": 5, "steps": 3}},
    "blend": {
        "method": "best_fit",
        "blend": {
            "parts": {"long": {"source": "text", "min_tokens": 100}, "short": {"source": "text", "max_tokens": 99}},
            "stages": [{"steps": 2, "weights": {"short": 1}}, {"weights": {"long": 3, "short": 1}}],
        },
    },
}


def config_of(directory: Path, prepared: Path, context: int, data: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": small_model(1),
        "data": {"sources": ["unused"], "directory": str(prepared), **data},
        "train": {"steps": 4, "sequence_length": 96, "tokens_per_step": 384, "dtype": "fp32", "report_every": 1},
        "parallel": {"context": context, "plan": "ring", "order": "zigzag"},
        "eval": {"rows": 2},
    }
    return RunConfig.model_validate(tree)


def test_training_does_not_depend_on_the_ranks(pool: Pool, tmp_path: Path) -> None:
    prepared = prepare_small(tmp_path)
    by_world = [
        pool.run(
            world, train_runs, [config_of(tmp_path / f"{n}{world}", prepared, world, d) for n, d in METHODS.items()]
        )[0]
        for world in (1, 2)
    ]
    for name, alone, shared in zip(METHODS, *by_world, strict=True):
        for one, two in zip(alone, shared, strict=True):
            assert one.keys() == two.keys()
            assert one["tokens"] == two["tokens"]
            assert math.isclose(one["loss"], two["loss"], rel_tol=1e-5), name
            assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-4), name
    found = dict(zip(METHODS, by_world[0], strict=True))
    assert all(max(lengths_in(row)) <= 4 for row in found["window"][:1])
    assert max(lengths_in(found["window"][3])) == 64
    assert [(row["blend_rows_long"], row["blend_rows_short"]) for row in found["blend"]] == [
        (0, 4),
        (0, 8),
        (3, 9),
        (6, 10),
    ]
    assert found["blend"][3]["blend_epochs_short"] > 0


def lengths_in(row: dict[str, Any]) -> list[int]:
    """Where a step's loss by length has tokens."""
    return [int(name.removeprefix("tokens_length_")) for name in row if name.startswith("tokens_length_")]
