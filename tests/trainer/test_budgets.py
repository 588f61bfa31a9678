"""The file between `farspan calibrate` and `attention.sparse.budgets`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.trainer.budgets import Budgets
from farspan.trainer.config import ConfigError, RunConfig

BUDGETS = Budgets(4096, 0.9, 8, 0.9, [[], [1, 2]], [[], [3, 4]])


def config(layers: int = 2, heads: int = 2, **sparse: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {
            "layers": layers,
            "heads": heads,
            "kv_heads": 2,
            "head_dim": 8,
            "hidden_size": 32,
            "feed_forward_size": 64,
        },
        "data": {"sources": ["unused"], "directory": "unused"},
        "train": {"steps": 1, "sequence_length": 4096, "tokens_per_step": 4096},
        "attention": {"sparse": {"dense_layers": [0]} | sparse},
    }
    return RunConfig.model_validate(tree)


def refused(path: Path, says: str, budgets: Budgets = BUDGETS, **changes: Any) -> None:
    budgets.write(path)
    with pytest.raises(ConfigError, match=says):
        Budgets.read(path, config(**changes))


def test_comes_back_as_written(tmp_path: Path) -> None:
    BUDGETS.write(tmp_path / "budgets.yaml")
    assert Budgets.read(tmp_path / "budgets.yaml", config()) == BUDGETS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file"),
        ("a: 1", "was not written by farspan calibrate"),
        ("[", "was not written by farspan calibrate"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "budgets.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        Budgets.read(tmp_path / "budgets.yaml", config())


def test_those_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "budgets.yaml"
    refused(path, "this one has 3 layers of 2 query heads", layers=3)
    refused(path, "this one has 2 layers of 4 query heads", heads=4)
    refused(path, "has none for layers .0., which select; calibrate with the same", dense_layers=[])
    refused(path, "more columns than attention.sparse.most_columns 1 allows; raise it", most_columns=1)
    refused(path, "more diagonals than attention.sparse.most_diagonals 3 allows", most_diagonals=3)
    refused(path, "is for rows of 512 tokens, but train.sequence_length is 4096", replace(BUDGETS, length=512))
    refused(path, "was not written by farspan calibrate", replace(BUDGETS, columns=[[], [1, -1]]))
