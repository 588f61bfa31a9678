"""The loss by length and position: every label once, in its bucket, and the same on any number of ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.corpus import prepare_small
from support.pool import Pool
from support.training import small_model, train_runs

from farspan.data.rows import IGNORED, Row
from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

LENGTH = 75
BOUNDS = ([0, 1, 3, 7, 75], [0, 64, 72, 75], [0, 75])


def make_rows() -> list[Row]:
    """A token's loss is to be a function of its id, and every token's id is another."""
    made = []
    for number, bounds in enumerate(BOUNDS):
        tokens = np.arange(LENGTH) + number * LENGTH
        labels = np.where(tokens % 5 == 0, IGNORED, tokens + 1)
        positions = np.concatenate([np.arange(stop - start) for start, stop in pairwise(bounds)])
        made.append(Row(tokens, labels, np.array(bounds), positions, int((labels != IGNORED).sum())))
    return made


def loss_of(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens + 1).float().log()


def profile_on(rank: int, world: int, order: str) -> dict[str, float]:
    from farspan.data.batch import make_batch
    from farspan.parallel import orders
    from farspan.parallel.degrees import Degrees
    from farspan.parallel.mesh import Mesh
    from farspan.trainer.loss_profile import LossProfile

    mesh = Mesh.create(Degrees(1, world, 1), torch.device("cpu"))
    try:
        profile = LossProfile(mesh)
        arranged = orders.build(order, LENGTH, world, 4)
        for rows in (make_rows()[:2], make_rows()[2:]):
            batch = make_batch(rows, arranged, mesh.context_rank)
            # What padding slots and tokens without a label are said to lose must not count.
            profile.add(batch, torch.where(batch.labels == IGNORED, 1e3, loss_of(batch.tokens)))
        return profile.means()
    finally:
        mesh.destroy()


def counted() -> dict[str, float]:
    """Token by token."""
    losses: dict[str, list[float]] = defaultdict(list)
    for row in make_rows():
        for start, stop in pairwise(row.cu_seqlens.tolist()):
            for place in range(start, stop):
                if row.labels[place] != IGNORED:
                    loss = float(loss_of(torch.tensor(row.tokens[place])))
                    losses[f"length_{2 ** int(math.log2(stop - start))}"].append(loss)
                    losses[f"position_{2 ** int(math.log2(max(1, place - start)))}"].append(loss)
    means = {f"loss_{name}": sum(found) / len(found) for name, found in losses.items()}
    return means | {f"tokens_{name}": len(found) for name, found in losses.items()}


def test_every_label_counts_in_its_bucket_and_ranks_change_no_bit(pool: Pool) -> None:
    alone = pool.run(1, profile_on, "contiguous")[0]
    wanted = counted()
    assert alone.keys() == wanted.keys()
    for name, value in wanted.items():
        assert math.isclose(alone[name], value, rel_tol=1e-7), name
    for world, order in ((2, "zigzag"), (4, "striped"), (3, "contiguous")):
        assert pool.run(world, profile_on, order) == [alone] * world


def config_of(directory: Path, prepared: Path, context: int) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": small_model(1),
        "data": {"sources": ["unused"], "directory": str(prepared)},
        "train": {"steps": 4, "sequence_length": 101, "tokens_per_step": 404, "dtype": "fp32", "report_every": 2},
        "parallel": {"context": context},
        "eval": {"rows": 3},
    }
    return RunConfig.model_validate(tree)


def profile_in(row: dict[str, Any], prefix: str, kind: str) -> tuple[float, int]:
    """The loss and the number of tokens that all buckets of a kind give together."""
    start = f"{prefix}tokens_"
    counts = {name.removeprefix(start): v for name, v in row.items() if name.startswith(f"{start}{kind}_")}
    total = sum(counts.values())
    return sum(row[f"{prefix}loss_{name}"] * count for name, count in counts.items()) / total, total


def test_a_run_reports_it_and_its_buckets_add_up_to_the_loss(pool: Pool, tmp_path: Path) -> None:
    prepared = prepare_small(tmp_path)
    by_world = []
    for world in (1, 2):
        config = config_of(tmp_path / f"run{world}", prepared, world)
        rows = pool.run(world, train_runs, [config])[0][0]
        assert [any("length" in name for name in row if name.startswith("loss_")) for row in rows] == [0, 1, 0, 1]
        assert any((config.run.dir / "tensorboard").iterdir())
        for kind in ("length", "position"):
            loss, tokens = profile_in(rows[3], "", kind)
            assert math.isclose(loss, rows[3]["loss"], rel_tol=1e-6)
            assert tokens == rows[3]["tokens"] - rows[2]["tokens"]
            loss, _ = profile_in(rows[3], "eval_", kind)
            assert math.isclose(loss, rows[3]["eval_loss"], rel_tol=1e-6)
        by_world.append(rows[3])
    one, two = by_world
    assert one.keys() == two.keys()
    assert all(math.isclose(one[name], two[name], rel_tol=1e-4) for name in one if "position" in name)
