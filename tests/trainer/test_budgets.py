"""The file between `farspan calibrate` and `attention.sparse.budgets`."""

from __future__ import annotations

from pathlib import Path

import pytest

from farspan.trainer.budgets import Budgets
from farspan.trainer.config import ConfigError

BUDGETS = Budgets(4096, 0.9, 8, 0.9, [[], [1, 2]], [[], [3, 4]])


def test_comes_back_as_written(tmp_path: Path) -> None:
    BUDGETS.write(tmp_path / "budgets.yaml")
    assert Budgets.read(tmp_path / "budgets.yaml", 2, 2) == BUDGETS


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
        Budgets.read(tmp_path / "budgets.yaml", 2, 2)


def test_those_of_another_model_are_refused(tmp_path: Path) -> None:
    BUDGETS.write(tmp_path / "budgets.yaml")
    for layers, heads in ((3, 2), (2, 4)):
        with pytest.raises(ConfigError, match=f"this one has {layers} layers of {heads} query heads"):
            Budgets.read(tmp_path / "budgets.yaml", layers, heads)
