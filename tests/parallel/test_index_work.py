"""Balance of sparse rings in exact integers: the patterns of MTraining's argument, 512K tokens over 32 ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel import orders
from farspan.parallel.balance import imbalance, stage_imbalance, step_imbalance
from farspan.parallel.index_work import work

LENGTH, BLOCK, WORLD = 1 << 19, 64, 32
BLOCKS = LENGTH // BLOCK


def index_of(diagonals: np.ndarray, columns: int = 0) -> VerticalSlashIndex:
    selected = torch.zeros(1, 1, BLOCKS, dtype=torch.bool)
    selected[0, 0, np.append(diagonals, 0)] = True
    chosen = np.sort(np.random.default_rng(1).choice(LENGTH, columns, replace=False))
    listed = torch.from_numpy(np.append(chosen, LENGTH).astype(np.int32))[None, None]
    return VerticalSlashIndex(selected, listed, LENGTH, BLOCK)


def pattern(name: str) -> VerticalSlashIndex:
    draw = np.random.default_rng(0)
    log_uniform = np.unique(np.exp(draw.uniform(0, np.log(BLOCKS), 300)).astype(int))
    return {
        "local": lambda: index_of(np.arange(8)),
        "log uniform": lambda: index_of(np.append(np.arange(8), log_uniform)),
        "uniform": lambda: index_of(draw.choice(BLOCKS, 404, replace=False)),
        "far": lambda: index_of(BLOCKS // 2 + draw.choice(BLOCKS // 2, 20, replace=False)),
        "few": lambda: index_of(draw.choice(BLOCKS, 8, replace=False)),
        "columns": lambda: index_of(np.arange(1), 2000),
        "both": lambda: index_of(log_uniform, 2000),
    }[name]()


def measures(name: str, order: str) -> tuple[float, float, float]:
    found = work(pattern(name), orders.build(order, LENGTH, WORLD, BLOCK)).sum(0)
    return imbalance(found), stage_imbalance(found), step_imbalance(found)


@pytest.mark.parametrize("name", ["local", "log uniform", "uniform", "far", "few"])
def test_striped_blocks_balance_diagonals(name: str) -> None:
    ranks, stages, _ = measures(name, "striped")
    assert ranks <= 1.01
    assert stages <= 1.01


def test_striped_blocks_with_columns() -> None:
    ranks, stages, _ = measures("both", "striped")
    assert ranks <= 1.1
    assert stages <= 1.1
    ranks, stages, _ = measures("columns", "striped")
    assert ranks <= 1.01
    assert 1.2 <= stages <= 1.5  # hot columns in one block are one rank's, and each rank meets them at another stage


def test_other_orders_are_as_unbalanced_as_the_reference_says() -> None:
    assert measures("log uniform", "zigzag")[1] >= 1.3
    assert measures("far", "zigzag")[1] >= 3
    assert measures("few", "zigzag")[1] >= 1.3
    assert measures("uniform", "contiguous")[0] == pytest.approx(2.0, abs=0.1)
    assert measures("far", "contiguous")[0] >= 2.5
    assert measures("local", "contiguous")[0] <= 1.01
    assert measures("local", "zigzag")[2] >= 25  # all work is in one stage of 32
    assert measures("local", "striped")[2] == pytest.approx(4.0, abs=0.1)


def test_a_stage_has_the_diagonals_of_one_residue_class() -> None:
    """At stage s rank r works on diagonals s mod world alone, and ranks differ by at most one tile on each."""
    index = pattern("log uniform")
    by_rank = work(index, orders.striped(LENGTH, WORLD, BLOCK))[0] // BLOCK**2
    distances = torch.nonzero(index.diagonals[0, 0])[:, 0].numpy()
    for stage in range(WORLD):
        of_class = distances[distances % WORLD == stage]
        counts = by_rank[:, stage]
        assert counts.sum() == (BLOCKS - of_class).sum()
        assert counts.max() - counts.min() <= len(of_class)


def test_equals_counting_one_by_one() -> None:
    length, block, world = 96, 4, 3
    draw = torch.Generator().manual_seed(3)
    blocks = length // block
    diagonals = torch.rand(1, 2, blocks, generator=draw) < 0.3
    diagonals[..., 0] = True
    columns = (torch.rand(1, 2, length, generator=draw) < 0.1).int()
    listed = torch.where(columns > 0, torch.arange(length), length).sort(-1).values.int()
    index = VerticalSlashIndex(diagonals, listed, length, block)
    for order in (orders.striped(length, world, block), orders.zigzag(length, world)):
        expected = np.zeros((2, world, world), np.int64)
        holder = np.empty(length, np.int64)
        for rank, positions in enumerate(order.positions):
            holder[positions] = rank
        for head in range(2):
            for q in range(length):
                for k in range(length):
                    distance = q // block - k // block
                    if distance >= 0 and (diagonals[0, head, distance] or columns[0, head, k]):
                        expected[head, holder[q], (holder[q] - holder[k]) % world] += 1
        assert (work(index, order) == expected).all()


def test_blocks_on_several_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="not each on one rank"):
        work(pattern("local"), orders.striped(LENGTH, WORLD, 16))
