"""Fixed budgets of sparse attention: how many columns and diagonals each head selects, by `farspan calibrate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from farspan.trainer.config import ConfigError, RunConfig


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
    def read(cls, path: Path, config: RunConfig) -> Budgets:
        """ConfigError, naming the key to change, when the file is not for such a run."""
        model, sparse = config.model, config.attention.sparse
        assert sparse is not None
        try:
            budgets = cls(**yaml.safe_load(path.read_text()))
            numbers = [number for lists in (budgets.columns, budgets.diagonals) for heads in lists for number in heads]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise TypeError("a budget is a number of columns or diagonals")
        except OSError as error:
            raise ConfigError(f"attention.sparse.budgets {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"attention.sparse.budgets {path} was not written by farspan calibrate") from error
        if budgets.length != config.train.sequence_length:
            raise ConfigError(
                f"attention.sparse.budgets {path} is for rows of {budgets.length} tokens, but train.sequence_length is "
                f"{config.train.sequence_length}; calibrate for that length"
            )
        selecting = sparse.layers(model.layers, config.attention.window)
        for name, lists, cap in (
            ("columns", budgets.columns, sparse.most_columns),
            ("diagonals", budgets.diagonals, sparse.most_diagonals),
        ):
            if len(lists) != model.layers or any(len(heads) not in (0, model.heads) for heads in lists):
                raise ConfigError(
                    f"attention.sparse.budgets {path} is of another model: this one has {model.layers} layers of "
                    f"{model.heads} query heads"
                )
            missing = [layer for layer in selecting if not lists[layer]]
            if missing:
                raise ConfigError(
                    f"attention.sparse.budgets {path} has none for layers {missing}, which select; calibrate with the "
                    "same attention.sparse.dense_layers"
                )
            if max(max(lists[layer]) for layer in selecting) > cap:
                raise ConfigError(
                    f"attention.sparse.budgets {path} has more {name} than attention.sparse.most_{name} {cap} allows; "
                    "raise it"
                )
        return budgets
