"""The estimated index is the same, bit for bit, for any number of ranks and every order that keeps blocks together."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.planted import planted
from support.pool import Pool
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.kernels.estimate import VerticalSlash
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

pytestmark = pytest.mark.distributed

LENGTH = 2048  # what zigzag needs on 8 ranks
CU = [0, 700, 1000, 1001, 1031, LENGTH]
FEW = VerticalSlash(
    probes=16, segments=2, documents=3, sinks=4, local_blocks=1, most_columns=3, most_diagonals=3, mass=0.97
)


class Case(NamedTuple):
    mask: IntervalMask
    settings: VerticalSlash
    heads: tuple[int, int]
    dtype: torch.dtype
    strength: float

    def inputs(self) -> tuple[Tensor, Tensor]:
        columns = tuple(range(100, 1500, 31))
        return planted(LENGTH, self.heads, columns, (400, 901), self.strength, self.mask.batch, self.dtype)


PACKED = masks.stack([masks.causal(LENGTH, CU), masks.sliding_window(LENGTH, 900, 3)])
CASES = {
    "grouped": Case(masks.causal(LENGTH), VerticalSlash(), (6, 2), torch.bfloat16, 12.0),
    "a kv head each": Case(masks.causal(LENGTH), VerticalSlash(), (3, 3), torch.float32, 8.0),
    "packed": Case(PACKED, FEW, (4, 2), torch.float32, 8.0),
    "caps": Case(masks.full(LENGTH), FEW, (5, 1), torch.float16, 8.0),
}


def estimates(rank: int, world: int, runs: list[tuple[str, str]]) -> list[tuple[Tensor, ...]]:
    results = []
    for name, order_name in runs:
        case, order = CASES[name], orders.build(order_name, LENGTH, world)
        q, k = (order.shard(x, rank) for x in case.inputs())
        estimator = Estimator(order, case.mask, case.settings, rank, dist.group.WORLD, "cpu")
        index, covered = estimator(q, k)
        results.append((index.diagonals, index.columns, covered))
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, ...]]:
    found = {}
    for name, case in CASES.items():
        estimator = Estimator(orders.contiguous(LENGTH, 1), case.mask, case.settings, 0, None, "cpu")
        index, covered = estimator(*case.inputs())
        assert bool((index.column_counts() > case.settings.sinks).any())
        assert bool((index.diagonals.sum(-1) > case.settings.local_blocks).any())
        found[name] = (index.diagonals, index.columns, covered)
    return found


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_index_does_not_depend_on_who_holds_what(
    pool: Pool, world: int, alone: dict[str, tuple[Tensor, ...]]
) -> None:
    names = ["contiguous", "zigzag", "striped"] if world > 1 else ["contiguous"]
    runs = list(product(CASES, names))
    for found in pool.run(world, estimates, runs):
        for (name, order_name), got in zip(runs, found, strict=True):
            for x, wanted in zip(got, alone[name], strict=True):
                assert torch.equal(x, wanted), (name, order_name)


def padded(rank: int, world: int) -> tuple[Tensor, ...]:
    """A row of 1000 tokens on ranks of two stripes each: the last stripe has padding, whose keys are arbitrary."""
    order = orders.striped(1000, world, 128)
    q, k = planted(1000, (3, 1), (130, 340), (200,), 8.0)
    q, k = (order.shard(x, rank, padding=float("nan")) for x in (q, k))
    estimator = Estimator(order, masks.causal(1000), VerticalSlash(), rank, dist.group.WORLD, "cpu")
    index, covered = estimator(q, k)
    return index.diagonals, index.columns, covered


def test_padding_is_never_looked_at(pool: Pool) -> None:
    wanted, *_ = pool.run(1, padded)
    for found in pool.run(4, padded):
        assert all(map(torch.equal, found, wanted))


def test_an_order_of_several_ranks_needs_their_group() -> None:
    with pytest.raises(ValueError, match="needs the process group"):
        Estimator(orders.striped(512, 2, 128), masks.causal(512), VerticalSlash(), 0, None, "cpu")
