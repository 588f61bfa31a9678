"""What is said of a plan's pieces beforehand is what the executor asks of kernels, so a choice is told truly."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from support.oracle import random_qkv
from support.plan_cases import ORDERS, PlanCase, order_case, plan_cases
from support.pool import Pool

from farspan.kernels import masks
from farspan.kernels.problem import Problem
from farspan.parallel import plans
from farspan.parallel.execute import attention
from farspan.parallel.prepare import prepare
from farspan.parallel.problems import problems

pytestmark = pytest.mark.distributed

HEADS, LENGTH, DIM = (4, 2), 45, 8


def compare(rank: int, world: int, case: PlanCase, order_name: str) -> None:
    """Choices are remembered by the mask of their piece, under the problem that was asked."""
    order, mask = order_case(order_name, LENGTH, world), masks.causal(LENGTH, [0, 20, LENGTH])
    q, k, v, dout = (order.shard(x, rank).requires_grad_() for x in random_qkv(LENGTH, HEADS, DIM))
    prepared = prepare(plans.build(case.plan, order, mask, HEADS, case.topology), order, mask, rank)
    out, _ = attention(q, k, v, prepared, dist.group.WORLD)
    out.backward(dout)
    told = defaultdict(set)
    tensors = Problem(1, 0, 0, 0, DIM, DIM, torch.float64, None)
    for backward in (False, True):
        for piece, problem in problems(prepared, tensors, backward):
            told[piece.mask].add(f"choice of auto for {problem}")
    asked = {mask: {name for name in mask.derived if name.startswith("choice of ")} for mask in told}
    assert asked == told


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world", [1, 3, 4])
def test_problems_are_those_that_kernels_get(world: int, order: str, pool: Pool) -> None:
    for case in plan_cases(world):
        pool.run(world, compare, case, order)
