"""Fixed budgets of sparse attention: how many columns and diagonals each head selects, by `farspan calibrate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from farspan.trainer.config import ConfigError


@dataclass(frozen=True)
class Budgets:
    """By layer and query head, besides what is always selected; a layer that is always dense has empty lists.

    `length`, `mass`, `rows` and `quantile` say what they were measured on: enough for so much mass in that share of so
    many rows.
    """

    length: int
    mass: float
    rows: int
    quantile: float
    columns: list[list[int]]
    diagonals: list[list[int]]

    def write(self, path: Path) -> None:
        head = "# Columns and diagonals of each layer's query heads, by `farspan calibrate`.\n"
        path.write_text(head + yaml.safe_dump(asdict(self), sort_keys=False, default_flow_style=None, width=120))

    @classmethod
    def read(cls, path: Path, layers: int, heads: int) -> Budgets:
        """ConfigError, naming the key to change, when the file is not of a model of so many layers and query heads."""
        try:
            tree: Any = yaml.safe_load(path.read_text())
            budgets = cls(**tree)
        except OSError as error:
            raise ConfigError(f"attention.sparse.budgets {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"attention.sparse.budgets {path} was not written by farspan calibrate") from error
        for lists in (budgets.columns, budgets.diagonals):
            if len(lists) != layers or any(len(numbers) not in (0, heads) for numbers in lists):
                raise ConfigError(
                    f"attention.sparse.budgets {path} is of another model: this one has {layers} layers of {heads} "
                    "query heads"
                )
        return budgets
