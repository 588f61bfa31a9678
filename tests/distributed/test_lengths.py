"""A run over rows of many lengths: the context degree follows them, and the loss does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpus import prepare_small
from support.pool import Pool

from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

STEPS = 14


def make_config(directory: Path, prepared: Path, **sections: Any) -> RunConfig:
    """Rows of 64 to 4096 tokens, as many steps of each."""
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": {
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward_size": 48,
        },
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


def train_runs(rank: int, world: int, configs: list[RunConfig]) -> list[list[dict[str, Any]]]:
    """Trains each configuration in turn on all ranks of the pool; rank 0 returns the rows of metrics.jsonl."""
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.parallel.mesh import Mesh
    from farspan.trainer.metrics import MetricsFile
    from farspan.trainer.preflight import check
    from farspan.trainer.row_length import narrower_contexts
    from farspan.trainer.stop import StopRequest
    from farspan.trainer.train import train_on

    results = []
    for config in configs:
        if rank == 0:
            config.run.dir.mkdir(parents=True)
        preflight = check(config, world)
        mesh = Mesh.create(preflight.degrees, torch.device("cpu"), narrower=narrower_contexts(config))
        train_on(mesh, config, preflight, StopRequest(), True, lambda line: None)
        mesh.destroy()
        results.append(MetricsFile(config.run.dir / "metrics.jsonl").read() if rank == 0 else [])
    return results


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
