"""How much sparse attention is expected to compute, before anything has run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farspan.kernels.tiles import TILE
from farspan.trainer.attention_config import SparseSection
from farspan.trainer.budgets import Budgets
from farspan.trainer.config import RunConfig


@dataclass(frozen=True)
class ExpectedWork:
    """Of the layers that select: the share of causal attention that they compute, on average; 1 is dense.

    `source` says where that is from. `columns` are those of a head at most.
    """

    density: float
    source: str
    columns: int


def expected_work(config: RunConfig) -> ExpectedWork | None:
    """By `expected_density`, else by what the estimator allows at most; None where no layer selects in training.

    Fixed budgets and caps count what is nearest, the longest diagonals and columns: an upper bound. MoBA's chunks are
    counted for each token; XAttention bounds nothing.
    """
    sparse, length = config.attention.sparse, config.train.sequence_length
    if sparse is None or not sparse.train:
        return None
    columns = min(sparse.most_columns, length) + sparse.sinks if sparse.estimator == "vertical_slash" else 0
    if sparse.expected_density is not None:
        return ExpectedWork(sparse.expected_density, "attention.sparse.expected_density", columns)
    if sparse.estimator == "xattention":
        return ExpectedWork(1.0, "nothing: xattention has no cap (set attention.sparse.expected_density)", columns)
    if sparse.estimator == "moba":
        source = (
            "attention.sparse.top_k chunks of each token alone: tokens of one tile that choose differently make it "
            "more (attention.sparse.expected_density)"
        )
        return ExpectedWork(_share_of_chunks(sparse.top_k, sparse.chunk, length), source, columns)
    if sparse.budgets is not None:
        budgets = Budgets.read(sparse.budgets, config)
        layers = sparse.layers(config.model.layers, config.attention.window)
        shares = [
            _share(*budget, sparse, length)
            for layer in layers
            for budget in zip(budgets.columns[layer], budgets.diagonals[layer])
        ]
        source = "attention.sparse.budgets, each diagonal the longest that it may be"
        return ExpectedWork(float(np.mean(shares)), source, columns)
    caps = _share(sparse.most_columns, sparse.most_diagonals, sparse, length)
    source = "the caps most_columns and most_diagonals: no head computes more (attention.sparse.expected_density)"
    return ExpectedWork(caps, source, columns)


def _share(columns: int, diagonals: int, sparse: SparseSection, length: int) -> float:
    """Of causal attention: so many of the nearest diagonals and first columns, beside what is always selected."""
    blocks = -(-length // TILE)
    nearest = min(diagonals + sparse.local_blocks, blocks)
    tiles = nearest * blocks - nearest * (nearest - 1) // 2
    first = min(columns + sparse.sinks, length)
    keys = first * length - first * (first - 1) // 2
    return min(1.0, tiles / (blocks * (blocks + 1) // 2) + keys / (length * (length + 1) // 2))


def _share_of_chunks(top_k: int, chunk: int, length: int) -> float:
    """Of causal attention: each token's own chunk up to itself, and as many whole ones before it as it may have."""
    token = np.arange(length)
    keys = np.minimum(token // chunk, top_k - 1) * chunk + token % chunk + 1
    return float(keys.sum() / (length * (length + 1) / 2))
