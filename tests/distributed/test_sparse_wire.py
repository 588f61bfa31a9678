"""A wire that leaves out what no rank reads: the same attention, fewer bytes, and no call where nothing is selected."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.index_cases import IndexCase, index_cases
from support.oracle import MaskCase, dense_attention, difference, mask_cases, random_qkv
from support.plan_cases import PlanCase, plan_cases
from support.pool import Pool
from support.run_plan import run_plan

from farspan.kernels import masks
from farspan.kernels.block_index import BlockIndex
from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel import execute, orders, plans
from farspan.parallel.plan import Plan
from farspan.parallel.sieve import Sieve, bytes_sent
from farspan.parallel.verify import verify

pytestmark = pytest.mark.distributed

BLOCK, DIM, BATCH = 4, 4, 2
HEADS = {2: (4, 1), 3: (4, 2), 4: (6, 2), 8: (6, 3)}


class Found(NamedTuple):
    error: float
    sent: int  # by all ranks, in both directions, as the transport counted
    expected: int
    dense: int


def far_apart(length: int, heads: int) -> IndexCase:
    """Two diagonals, one of them in the first head alone, and a column: most ranks read little of most others."""
    diagonals, far = torch.zeros(1, heads, length // BLOCK, dtype=torch.bool), length // BLOCK // 2
    diagonals[..., 0] = diagonals[:, 0, far] = True
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    selected = ((q // BLOCK == k // BLOCK) | (k == 5)).expand(1, heads, -1, -1).clone()
    selected[:, 0] |= q // BLOCK - k // BLOCK == far
    columns = torch.tensor([[[5, length]] * heads]).int()
    return IndexCase("far apart", VerticalSlashIndex(diagonals, columns, length, BLOCK), selected)


def check(rank: int, world: int) -> dict[str, tuple[float, int, int, int]]:
    heads, found = HEADS[world], {}
    length = 4 * BLOCK * world
    cases = [case for case in plan_cases(world) if case.plan in ("ring", "hierarchical_ring", "all_gather")]
    of_masks = [mask for mask in mask_cases(length) if mask.name in ("causal", "documents", "full")]
    indexes = [*index_cases(length, heads[0], BLOCK, batch=BATCH), far_apart(length, heads[0])]
    for number, (case, name, index) in enumerate(product(cases, ("striped", "zigzag", "contiguous"), indexes)):
        order, mask = orders.build(name, length, world, BLOCK), of_masks[number % len(of_masks)]
        plan = plans.build(case.plan, order, mask.mask, heads, case.topology)
        key = f"{case.plan} {name} {index.name} {mask.name}"
        found[key] = tuple(compare(rank, plan, order, mask, index))
    return found


def compare(rank: int, plan: Plan, order: orders.Order, mask: MaskCase, case: IndexCase) -> Found:
    whole = random_qkv(order.length, plan.heads, DIM, batch=BATCH)
    expected = dense_attention(*whole[:3], case.selected & mask.allowed[:, None], whole[3])
    (out, _, *gradients), sent = run_plan(rank, plan, order, mask.mask, whole, index=case.index, sparse_wire=True)
    pairs = zip((out, *gradients), (expected[0], *expected[2:]), strict=True)
    error = max(difference(got, order.shard(wanted, rank)) for got, wanted in pairs)
    moved = torch.tensor(sum(sent.values()))
    dist.all_reduce(moved)
    sieve = Sieve(plan, order, mask.mask, rank, BLOCK, "cpu")
    counted, dense = bytes_sent(sieve, case.index, DIM, BATCH, 8, 8)
    report = verify(plan, order, mask.mask, head_dim=DIM, batch=BATCH)
    assert dense == sum(sum(report.bytes_sent(direction, 8, 8)) for direction in ("forward", "backward"))
    return Found(error, int(moved), counted, dense)


@pytest.mark.parametrize("world", [2, 3, 4, pytest.param(8, marks=pytest.mark.full)])
def test_equals_the_oracle_and_moves_what_is_counted(pool: Pool, world: int) -> None:
    for tuples in pool.run(world, check):
        results = {name: Found(*found) for name, found in tuples.items()}
        assert {name: found.error for name, found in results.items() if not found.error < 1e-10} == {}
        assert {name: found for name, found in results.items() if found.sent != found.expected} == {}
        assert all(found.sent <= found.dense for found in results.values())
        assert all(found.sent == found.dense for name, found in results.items() if "everything full" in name)
        assert all(found.sent < found.dense for name, found in results.items() if "striped far apart" in name)


def expected_of_a_ring(index: IndexCase, allowed: torch.Tensor, order: orders.Order, heads: tuple[int, int]) -> int:
    """Tiles that travel in both directions, counted by the definition: operands twice, gradients of k and v once."""
    world, blocks = order.world, order.length // BLOCK
    computed = (index.selected & allowed[:, None]).unflatten(1, (heads[1], -1)).any(2).any(0)
    by_block = computed.unflatten(1, (blocks, BLOCK)).unflatten(3, (blocks, BLOCK)).any(4).any(2)
    reads = torch.stack([by_block[:, rank::world].any(1) for rank in range(world)]).numpy()  # [rank, kv head, block]
    tiles = 0
    for block in range(blocks):
        around = [reads[(block + hop) % world, :, block] for hop in range(world)]
        for hop in range(1, world):
            tiles += 2 * int(np.logical_or.reduce(around[hop:]).sum())
            tiles += int(np.logical_or.reduce(around[1 : hop + 1]).sum())
    return tiles


def test_a_striped_ring_sends_what_the_definition_says() -> None:
    world, heads = 4, HEADS[4]
    length = 4 * BLOCK * world
    order, mask = orders.striped(length, world, BLOCK), masks.causal(length)
    plan = plans.build("ring", order, mask, heads)
    allowed = mask.visible(slice(0, length), slice(0, length))
    for case in [*index_cases(length, heads[0], BLOCK, batch=BATCH), far_apart(length, heads[0])]:
        sent, _ = bytes_sent(Sieve(plan, order, mask, 0, BLOCK, "cpu"), case.index, DIM, BATCH, 8, 8)
        tile = 2 * BATCH * BLOCK * DIM * 8  # of keys and of values
        assert sent == tile * expected_of_a_ring(case, allowed, order, heads), case.name


def calls(rank: int, world: int, case: PlanCase, sparse_wire: bool) -> tuple[int, int]:
    """Calls of the kernels, forward and backward, on this rank."""
    heads, length = HEADS[world], 4 * BLOCK * world
    order, mask = orders.striped(length, world, BLOCK), masks.causal(length)
    index = VerticalSlashIndex(
        torch.zeros(1, heads[0], length // BLOCK, dtype=torch.bool),
        torch.full((1, heads[0], 1), length, dtype=torch.int32),
        length,
        BLOCK,
    )
    index.diagonals[..., 0] = index.diagonals[..., 2] = True
    plan = plans.build(case.plan, order, mask, heads, case.topology)
    with (
        patch.object(execute, "attend", wraps=execute.attend) as forward,
        patch.object(execute, "attend_backward", wraps=execute.attend_backward) as backward,
    ):
        run_plan(rank, plan, order, mask, random_qkv(length, heads, DIM), index=index, sparse_wire=sparse_wire)
    return forward.call_count, backward.call_count


def test_a_stage_that_nothing_selects_is_not_launched(pool: Pool) -> None:
    """Diagonals 0 and 2 of four striped ranks: each computes its own keys, and those of the rank two before it."""
    assert pool.run(4, calls, PlanCase("ring"), True) == [(2, 2)] * 4
    assert pool.run(4, calls, PlanCase("ring"), False) == [(4, 4)] * 4


def check_blocks(rank: int, world: int) -> tuple[float, int, int, int]:
    """Tiles of any shape, of which whole ranks read nothing."""
    heads, length = HEADS[world], 4 * BLOCK * world
    order, mask = orders.striped(length, world, BLOCK), next(m for m in mask_cases(length) if m.name == "causal")
    blocks = length // BLOCK
    tiles = torch.rand(BATCH, heads[0], blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.1
    tiles |= torch.eye(blocks, dtype=torch.bool)
    index = BlockIndex.of(tiles, length, BLOCK)
    selected = tiles.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    plan = plans.build("ring", order, mask.mask, heads)
    return tuple(compare(rank, plan, order, mask, IndexCase("tiles", index, selected)))  # type: ignore[return-value, arg-type]


def test_tiles_of_any_shape(pool: Pool) -> None:
    for found in (Found(*tuple_) for tuple_ in pool.run(4, check_blocks)):
        assert found.error < 1e-10
        assert found.sent == found.expected < found.dense


def test_a_plan_that_sends_queries_is_refused() -> None:
    order, mask = orders.striped(64, 2, BLOCK), masks.causal(64)
    plan = plans.build("ulysses", order, mask, (4, 2))
    with pytest.raises(ValueError, match=r"plan ulysses sends queries.*set parallel.plan to ring"):
        Sieve(plan, order, mask, 0, BLOCK, "cpu")
