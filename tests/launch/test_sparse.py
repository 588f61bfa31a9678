"""A run with sparse attention from end to end: trained, evaluated densely, calibrated, resumed with budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import farspan, last_metrics
from support.corpus import prepare_small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.distributed


def config(folder: Path) -> Path:
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 7},
        "launch": {"processes": 2},
        "model": {
            "hidden_size": 32,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "feed_forward_size": 64,
        },
        "data": {"sources": ["unused"], "directory": str(prepare_small(folder))},
        "train": {"steps": 4, "sequence_length": 512, "tokens_per_step": 512, "dtype": "fp32"},
        "parallel": {"context": 2, "plan": "ring", "order": "striped"},
        "attention": {
            "across_documents": True,
            "sparse": {"mass": 0.5, "most_columns": 32, "dense_layers": [0], "dense_steps": 1, "report_every": 2},
        },
        "eval": {"rows": 2},
        "checkpoint": {"every": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


@pytest.mark.full
def test_a_run_with_sparse_attention(tmp_path: Path) -> None:
    path = config(tmp_path)
    farspan("train", str(path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "sparse_density" not in rows[0]  # a dense step
    for row in rows[1:]:
        assert 0 < row["sparse_density"] < 1
        assert "sparse_density_layer_00" not in row
        assert "sparse_density_layer_02" in row
    measured = [row for row in rows if "sparse_recall" in row]
    assert [row["step"] for row in measured] == [2, 3]
    for row in measured:
        assert 0.3 < row["sparse_recall"] <= 1
        assert 1 <= row["sparse_imbalance_ranks"] <= row["sparse_imbalance_lockstep"] < 1.6
        # Of a ring of two, but for the last stripe, which nobody else sees: k and v in both directions, and gradients.
        assert row["sparse_dense_wire_bytes"] == row["sparse_dense_wire_bytes_layer_01"] == 3 * 2 * 384 * 2 * 16 * 4
        assert 0 < row["sparse_wire_bytes"] <= row["sparse_dense_wire_bytes"]
    assert 0 < rows[-1]["eval_sparse_density"] < 1
    assert 0.3 < rows[-1]["eval_sparse_recall"] < 1
    assert {name for name in rows[-1] if name.startswith("eval_sparse_recall_layer")} == {
        "eval_sparse_recall_layer_01",
        "eval_sparse_recall_layer_02",
    }
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"sparse/density", "sparse/recall_layer_01", "eval_sparse/density"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"sparse/density by layer and head", "sparse/work by rank and stage"}

    budgets = tmp_path / "budgets.yaml"
    farspan("calibrate", str(tmp_path / "run"), "--rows", "1", "--output", str(budgets))
    found = yaml.safe_load(budgets.read_text())
    assert found["diagonals"][0] == []
    assert [len(heads) for heads in found["diagonals"][1:]] == [4, 4]
    farspan(
        "train", str(path), f"attention.sparse.budgets={budgets}", "train.steps=6", "attention.sparse.evaluate=false"
    )
    last = last_metrics(tmp_path / "run")
    tiles, blocks = [4, 3, 2, 1], 4
    largest = max(
        (tiles[0] + tiles[1] + sum(tiles[2 : 2 + count])) / sum(tiles[:blocks]) for count in found["diagonals"][1]
    )
    assert last["sparse_density_layer_01"] <= largest + 1e-9
    assert "eval_sparse_density" not in last

    wire = ("train.steps=7", "parallel.sparse_wire=true", "attention.sparse.report_every=1")
    farspan("train", str(path), f"attention.sparse.budgets={budgets}", *wire)
    last = last_metrics(tmp_path / "run")
    assert last["step"] == 7
    assert 0 < last["sparse_wire_bytes"] <= last["sparse_dense_wire_bytes"]

    farspan("train", str(path), "train.steps=8", "attention.sparse.train=false")
    last = last_metrics(tmp_path / "run")
    assert "sparse_density" not in last
    assert 0 < last["eval_sparse_density"] < 1


@pytest.mark.full
@pytest.mark.parametrize("keys", ["estimator: xattention, threshold: 0.5", "estimator: moba, chunk: 128, top_k: 2"])
def test_a_run_with_another_estimator(tmp_path: Path, keys: str) -> None:
    path, run = config(tmp_path), tmp_path / "run"
    farspan("train", str(path), f"attention.sparse={{{keys}, report_every: 2}}", "train.steps=2", "checkpoint.every=2")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < row["sparse_density"] <= 1
    assert 0.3 < row["sparse_recall"] <= 1
    assert 1 <= row["sparse_imbalance_ranks"] <= row["sparse_imbalance_lockstep"]
    assert "sparse_columns" not in row
    farspan("train", str(run / "config.yaml"), "train.steps=3", "attention.sparse.refresh=2")
    said = farspan("calibrate", str(run), "--rows", "1", "--output", str(tmp_path / "budgets.yaml"), code=2)
    assert "has no budgets to calibrate; set it to vertical_slash" in said


@pytest.mark.full
def test_an_order_that_tears_tiles_apart_is_refused(tmp_path: Path) -> None:
    short = ("train.sequence_length=500", "train.tokens_per_step=500")
    said = farspan("train", str(config(tmp_path)), "parallel.order=zigzag", *short, code=2)
    assert "attention.sparse with parallel.order zigzag" in said
