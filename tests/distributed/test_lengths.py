"""A run over rows of many lengths: the context degree follows them, and the loss does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.corpus import prepare_small
from support.pool import Pool
from support.training import small_model, train_runs

from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

STEPS = 14


def make_config(directory: Path, prepared: Path, **sections: Any) -> RunConfig:
    """Rows of 64 to 4096 tokens, as many steps of each."""
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": small_model(2),
        "data": {
            "sources": ["unused"],
            "directory": str(prepared),
            "method": "decompose",
            "decompose": {"shortest": 64},
        },
        "curriculum": {"odds": "grow_p2", "mixture": "equal", "cycles": 2, "schedule": "sub_cycles"},
        "train": {"steps": STEPS, "sequence_length": 4096, "tokens_per_step": 8192, "dtype": "fp32"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "eval": {"rows": 2, "every": 7},
        **sections,
    }
    return RunConfig.model_validate(tree)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(pool: Pool, tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> list[dict[str, Any]]:
    config = make_config(tmp_path_factory.mktemp("alone") / "run", prepared)
    return pool.run(1, train_runs, [config])[0][0]


def check_against(alone: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    keys = ("loss", "grad_norm", "eval_loss")
    pairs = [(a[key], b[key]) for a, b in zip(alone, rows, strict=True) for key in keys if key in a]
    assert len(pairs) == 2 * STEPS + 2
    difference = max(abs(a - b) / abs(a) for a, b in pairs)
    print(f"largest relative difference {difference:.1e}")
    assert difference < 1e-5
    for key in ("tokens", "sequence_length"):
        assert [row[key] for row in rows] == [row[key] for row in alone]
    assert {row["tokens"] for row in rows} == {8192 * (step + 1) for step in range(STEPS)}


def test_the_context_degree_follows_the_length_and_the_loss_stays(
    pool: Pool, tmp_path: Path, prepared: Path, alone: list[dict[str, Any]]
) -> None:
    lengths = [row["sequence_length"] for row in alone]
    assert lengths[0] == 4096
    assert sorted(lengths) == sorted(2 * [64 << i for i in range(7)])
    zigzag = {"context": 4, "tokens_per_rank": 1024, "zero_stage": 3}
    striped = {"context": 4, "tokens_per_rank": 1500, "order": "striped", "stripe": 16, "plan": "all_gather"}
    train = {"steps": STEPS, "sequence_length": 4096, "tokens_per_step": 8192, "dtype": "fp32", "micro_batch_rows": 2}
    changes: list[dict[str, Any]] = [{"parallel": zigzag}, {"parallel": striped, "train": train}]
    configs = [make_config(tmp_path / str(i), prepared, **change) for i, change in enumerate(changes)]
    by_zigzag, by_striped = pool.run(4, train_runs, configs)[0]
    check_against(alone, by_zigzag)
    check_against(alone, by_striped)
    degrees = {row["sequence_length"]: row["context"] for row in by_zigzag}
    assert degrees == {4096: 4, 2048: 2, 1024: 1, 512: 1, 256: 1, 128: 1, 64: 1}
    assert {row["sequence_length"]: row["context"] for row in by_striped} == degrees


@pytest.mark.full
def test_with_tensor_ranks_and_a_hierarchy(
    pool: Pool, tmp_path: Path, prepared: Path, alone: list[dict[str, Any]]
) -> None:
    tensor = {"context": 2, "tensor": 2, "tokens_per_rank": 2048}
    nodes = {"context": 4, "inner": 2, "plan": "hierarchical_ring", "tokens_per_rank": 1024}
    configs = [
        make_config(tmp_path / str(i), prepared, parallel=parallel) for i, parallel in enumerate((tensor, nodes))
    ]
    for rows in pool.run(4, train_runs, configs)[0]:
        check_against(alone, rows)


def test_a_blend_is_counted_and_does_not_depend_on_the_ranks(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    data = {
        "sources": ["unused"],
        "directory": str(prepared),
        "method": "decompose",
        "decompose": {"shortest": 64},
        "blend": {
            "parts": {
                "long": {"source": "text", "min_tokens": 5000, "weight": 0.25},
                "short": {"source": "text", "max_tokens": 4999, "weight": 0.75},
            }
        },
    }
    curriculum = {"odds": "grow_p2", "cycles": 2}
    changes: dict[str, Any] = {"data": data, "curriculum": curriculum}
    alone = pool.run(1, train_runs, [make_config(tmp_path / "alone", prepared, **changes)])[0][0]
    changes["parallel"] = {"context": 2, "tokens_per_rank": 2048}
    shared = pool.run(2, train_runs, [make_config(tmp_path / "shared", prepared, **changes)])[0][0]
    check_against(alone, shared)
    for rows in (alone, shared):
        for row in rows:
            assert row["blend_tokens_long"] + row["blend_tokens_short"] == row["tokens"]
        # Steps are whole for each of seven lengths.
        assert rows[-1]["blend_tokens_long"] == pytest.approx(0.25 * 8192 * STEPS, abs=7 / 2 * 8192)
        assert rows[-1]["blend_rows_long"] > 0 < rows[-1]["blend_epochs_long"]
