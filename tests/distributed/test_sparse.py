"""Every plan carries out a sparse index: what it selects is computed once, whoever holds it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.index_cases import index_cases
from support.oracle import dense_attention, difference, mask_cases, random_qkv
from support.plan_cases import plan_cases
from support.pool import Pool
from support.run_plan import run_plan

from farspan.kernels import masks
from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel import orders, plans
from farspan.parallel.execute import attention
from farspan.parallel.prepare import prepare

pytestmark = pytest.mark.distributed

BLOCK = 4
HEADS = {1: (6, 2), 2: (4, 1), 3: (4, 2), 4: (6, 2), 6: (4, 4), 8: (6, 3)}


def check(rank: int, world: int) -> dict[str, float]:
    """Orders and plans whose tiles are whole blocks; the last stripe of `striped` is not full."""
    heads, errors = HEADS[world], {}
    cases = [case for case in plan_cases(world) if case.plan not in ("group_cast", "star")]  # cut between any tokens
    for number, ((name, topology), order_name) in enumerate(product(cases, ("contiguous", "zigzag", "striped"))):
        length = 4 * BLOCK * world - (3 if order_name == "striped" else 0)
        order = orders.build(order_name, length, world, BLOCK)
        indexes, of_masks = index_cases(length, heads[0], BLOCK, batch=2), mask_cases(length)
        case, mask = indexes[number % len(indexes)], of_masks[number % len(of_masks)]
        whole = random_qkv(length, heads, 4, batch=2)
        expected = dense_attention(*whole[:3], case.selected & mask.allowed[:, None], whole[3])
        plan = plans.build(name, order, mask.mask, heads, topology)
        (out, _, *gradients), _ = run_plan(rank, plan, order, mask.mask, whole, index=case.index)
        pairs = zip((out, *gradients), (expected[0], *expected[2:]), strict=True)
        key = f"{name} {topology} {order_name} {case.name} {mask.name}"
        errors[key] = max(difference(got, order.shard(wanted, rank)) for got, wanted in pairs)
    return errors


@pytest.mark.parametrize("world", [1, 2, 3, 4, *(pytest.param(n, marks=pytest.mark.full) for n in (6, 8))])
def test_equals_the_selected_oracle_in_fp64(pool: Pool, world: int) -> None:
    for errors in pool.run(world, check):
        assert {name: error for name, error in errors.items() if not error < 1e-10} == {}


def other_index_backward(rank: int, world: int) -> tuple[float, float]:
    """Largest difference of dk from the oracle's: with the index of the forward pass, and with another one."""
    length, heads = 4 * BLOCK * world, (4, 2)
    order, mask = orders.striped(length, world, BLOCK), masks.causal(length)
    case, other = (index_cases(length, heads[0], BLOCK)[i] for i in (0, 1))
    whole = random_qkv(length, heads, 4)
    allowed = case.selected & mask.visible(slice(0, length), slice(0, length))[:, None]
    expected = order.shard(dense_attention(*whole[:3], allowed, whole[3])[3], rank)
    prepared = prepare(plans.ring(order, mask, heads), order, mask, rank, sparse_block=BLOCK)
    found = []
    for backward_index in (case.index, other.index):
        q, k, v, dout = (order.shard(x, rank) for x in whole)
        local = [x.requires_grad_() for x in (q, k, v)]
        index = VerticalSlashIndex(case.index.diagonals.clone(), case.index.columns, length, BLOCK)
        out, _ = attention(*local, prepared, torch.distributed.group.WORLD, index=index)
        index.diagonals.copy_(backward_index.diagonals)
        out.backward(dout)
        assert k.grad is not None
        found.append(difference(k.grad, expected))
    return found[0], found[1]


def test_another_index_in_the_backward_pass_would_show(pool: Pool) -> None:
    right, wrong = (max(column) for column in zip(*pool.run(2, other_index_backward)))
    assert right < 1e-10
    assert wrong > 1e-3
