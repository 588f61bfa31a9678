"""XAttention and MoBA choose the same, bit for bit, for any number of ranks and every order of whole blocks."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.plan_cases import plan_cases
from support.planted import planted
from support.pool import Pool
from torch import Tensor

from farspan.kernels import IntervalMask, attend, masks
from farspan.kernels.block_index import BlockIndex
from farspan.kernels.chunk_index import ChunkIndex
from farspan.kernels.estimate import MoBA, Settings, XAttention
from farspan.kernels.index import Index, Places
from farspan.parallel import orders, plans
from farspan.parallel.estimate import Estimator
from farspan.parallel.execute import attention
from farspan.parallel.index_work import work
from farspan.parallel.prepare import prepare
from farspan.parallel.recall import Recall

pytestmark = pytest.mark.distributed

LENGTH = 1024  # what zigzag needs on 4 ranks
CU = [0, 300, 500, 501, 640, LENGTH]


class Case(NamedTuple):
    mask: IntervalMask
    settings: Settings
    heads: tuple[int, int]
    dtype: torch.dtype

    def inputs(self) -> tuple[Tensor, Tensor]:
        return planted(LENGTH, self.heads, (100, 420, 700), (400, 901), 30.0, self.mask.batch, self.dtype)


PACKED = masks.stack([masks.causal(LENGTH, CU), masks.causal(LENGTH)])
CASES = {
    "xattention": Case(masks.causal(LENGTH), XAttention(threshold=0.7), (6, 2), torch.bfloat16),
    "xattention, a kv head each": Case(masks.causal(LENGTH), XAttention(8, 0.6), (3, 3), torch.float32),
    "xattention, packed": Case(PACKED, XAttention(threshold=0.7), (4, 2), torch.float32),
    "moba": Case(masks.causal(LENGTH), MoBA(128, 3), (6, 2), torch.bfloat16),
    "moba, a kv head each": Case(masks.causal(LENGTH), MoBA(256, 2), (3, 3), torch.float32),
    "moba, packed": Case(PACKED, MoBA(128, 2), (4, 2), torch.float32),
}


def words(index: Index) -> Tensor:
    assert isinstance(index, BlockIndex | ChunkIndex)
    return index.words


def chosen(rank: int, world: int, runs: list[tuple[str, str]]) -> list[Tensor]:
    results = []
    for name, order_name in runs:
        case, order = CASES[name], orders.build(order_name, LENGTH, world)
        q, k = (order.shard(x, rank) for x in case.inputs())
        results.append(words(Estimator(order, case.mask, case.settings, rank, dist.group.WORLD, "cpu")(q, k)[0]))
    return results


def alone(name: str) -> Index:
    case = CASES[name]
    return Estimator(orders.contiguous(LENGTH, 1), case.mask, case.settings, 0, None, "cpu")(*case.inputs())[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_index_does_not_depend_on_who_holds_what(pool: Pool, world: int) -> None:
    wanted = {name: alone(name) for name in CASES}
    for name, index in wanted.items():  # something is left out
        assert float(index.to_dense().double().mean()) < 0.4, name
    runs = list(product(CASES, ["contiguous", "zigzag", "striped"] if world > 1 else ["contiguous"]))
    for found in pool.run(world, chosen, runs):
        for (name, order_name), got in zip(runs, found, strict=True):
            assert torch.equal(got, words(wanted[name])), (name, order_name)


def padded(rank: int, world: int) -> list[Tensor]:
    """A row of 1000 tokens on ranks of two stripes each: the last stripe has padding, whose values are arbitrary."""
    order = orders.striped(1000, world, 128)
    q, k = planted(1000, (3, 1), (130, 340), (200,), 30.0)
    q, k = (order.shard(x, rank, padding=float("nan")) for x in (q, k))
    methods = (XAttention(threshold=0.7), MoBA(128, 2))
    return [words(Estimator(order, masks.causal(1000), s, rank, dist.group.WORLD, "cpu")(q, k)[0]) for s in methods]


def test_padding_is_never_looked_at(pool: Pool) -> None:
    wanted, *_ = pool.run(1, padded)
    for found in pool.run(4, padded):
        assert all(map(torch.equal, found, wanted))


def carried_out(rank: int, world: int, name: str) -> dict[str, float]:
    """Largest differences of a plan's results from those of one device, and of what recall measures from 1."""
    case, errors = CASES[name], {}
    q, k = (x.double() for x in case.inputs())
    v, index = k.flip(3).contiguous(), alone(name)
    whole = index.at(Places.of(range(LENGTH), range(LENGTH)))
    expected = attend(q, k, v, case.mask, index=whole)[0]
    for (plan_name, topology), order_name in product(plan_cases(world), ("contiguous", "zigzag", "striped")):
        if plan_name in ("group_cast", "star"):  # cut between any tokens
            continue
        order = orders.build(order_name, LENGTH, world)
        plan = plans.build(plan_name, order, case.mask, case.heads, topology)
        prepared = prepare(plan, order, case.mask, rank, sparse_block=128)
        local = [order.shard(x, rank) for x in (q, k, v)]
        out, _ = attention(*local, prepared, dist.group.WORLD, index=index)
        errors[f"{plan_name} {topology} {order_name}"] = float((out - order.shard(expected, rank)).abs().max())
    return errors


@pytest.mark.parametrize("name", ["xattention", "moba", "moba, packed"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_plan_carries_it_out(pool: Pool, world: int, name: str) -> None:
    for errors in pool.run(world, carried_out, name):
        assert {where: error for where, error in errors.items() if not error < 1e-10} == {}


def recalls(rank: int, world: int, name: str) -> tuple[Tensor, Tensor]:
    """As measured, and as the dense matrices have it."""
    case, index = CASES[name], alone(name)
    order, rows = orders.build("striped", LENGTH, world), torch.tensor([5, 300, 501, 777, 1023])
    q, k = (x.float() for x in case.inputs())
    recall = Recall(rows.numpy(), order, case.mask, rank, dist.group.WORLD)
    measured = recall(order.shard(q, rank), order.shard(k, rank), index)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bphd,bnhd->bhpn", q[:, rows], keys) * q.shape[3] ** -0.5
    seen = case.mask.visible(slice(0, LENGTH), slice(0, LENGTH))[:, None, rows]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return measured, (weights * index.to_dense()[:, :, rows]).sum(-1)


@pytest.mark.parametrize("name", ["xattention, packed", "moba, packed"])
def test_recall_is_measured(pool: Pool, name: str) -> None:
    for measured, wanted in pool.run(2, recalls, name):
        assert torch.allclose(measured, wanted, atol=1e-5)
        assert float(wanted.min()) < 0.95


@pytest.mark.parametrize("name", ["xattention, packed", "moba"])
@pytest.mark.parametrize("order_name", ["striped", "zigzag"])
def test_work_is_counted_by_tiles(name: str, order_name: str) -> None:
    index, world, block = alone(name), 4, 128
    order = orders.build(order_name, LENGTH, world)
    blocks, row = LENGTH // block, index.to_dense().shape[0] - 1
    holder = torch.empty(blocks, dtype=torch.long)
    for rank, positions in enumerate(order.positions):
        holder[positions[::block] // block] = rank
    tiles = index.to_dense()[row].unflatten(2, (blocks, block)).unflatten(1, (blocks, block)).any(4).any(2)
    wanted = torch.zeros(index.heads, world, world, dtype=torch.long)
    for head, q, key in tiles.nonzero().tolist():
        wanted[head, holder[q], (holder[q] - holder[key]) % world] += block * block
    assert torch.equal(torch.from_numpy(work(index, order, row)), wanted)


def test_an_order_of_several_ranks_needs_their_group() -> None:
    with pytest.raises(ValueError, match="needs the process group"):
        Estimator(orders.striped(512, 2, 128), masks.causal(512), MoBA(128, 2), 0, None, "cpu")
