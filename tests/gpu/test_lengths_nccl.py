"""Over NCCL: a run whose rows are shared by two GPUs or by one, as their length asks, trains like one GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.corpus import prepare_small

CONFIG = Path(__file__).parents[2] / "configs" / "decompose.yaml"
STEPS = 12


def train(folder: Path, prepared: Path, *overrides: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "farspan.launch.command", "train", str(CONFIG), f"run.dir={folder}"]
    command += [f"data.directory={prepared}", f"train.steps={STEPS}", "curriculum.cycles=2", "eval.rows=2"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    one = ["launch.processes=1", "parallel.context=1", "parallel.tokens_per_rank=2048"]
    return train(tmp_path_factory.mktemp("alone"), prepared, *one)


@pytest.mark.multigpu
@pytest.mark.parametrize("workers", [0, 2])
def test_two_gpus_train_like_one(tmp_path: Path, prepared: Path, alone: list[dict[str, Any]], workers: int) -> None:
    both = train(tmp_path, prepared, f"data.workers={workers}")
    assert {row["context"] for row in both} == {1, 2}
    assert [row["sequence_length"] for row in both] == [row["sequence_length"] for row in alone]
    difference = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(alone, both, strict=True))
    print(f"largest relative difference {difference:.1e}")
    assert difference < 1e-4
