"""Probes of every plan: where one token's change, or one key's gradient, may be felt; and rows of unusual shapes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from support.oracle import dense_attention, difference, mask_cases, random_qkv
from support.plan_cases import ORDERS, PlanCase, order_case, plan_cases
from support.pool import Pool
from support.run_plan import run_plan
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.parallel import plans
from farspan.parallel.orders import Order
from farspan.parallel.verify import verify

pytestmark = pytest.mark.distributed

WORLD = 4
LENGTH = 45
HEADS = (4, 2)
EVERY_PLAN = pytest.mark.parametrize("case", plan_cases(WORLD), ids=str)
# Where no row sees what comes after it.
CAUSAL_MASKS = ("documents", "window", "star", "question")


def owner(order: Order, position: int) -> int:
    return next(rank for rank, positions in enumerate(order.positions) if position in positions)


def change_tokens(rank: int, world: int, case: PlanCase) -> int:
    """What a token's q, k and v do to the rows that do not see it, and to keys that no row shares with it: nothing."""
    probes = 0
    for number, (name, order_name) in enumerate(product(CAUSAL_MASKS, ORDERS)):
        mask_case = next(found for found in mask_cases(LENGTH) if found.name == name)
        order, allowed = order_case(order_name, LENGTH, world), mask_case.allowed[0]
        plan = plans.build(case.plan, order, mask_case.mask, HEADS, case.topology)
        before = random_qkv(LENGTH, HEADS, 4)
        (out, lse, dq, dk, dv), _ = run_plan(rank, plan, order, mask_case.mask, before)
        real = order.real(rank)
        here = torch.from_numpy(order.positions[rank][real])
        token = (0, 13, 40)[number % 3]
        after = [x.clone() for x in before]
        for x in after[:3]:
            x[:, token] = 100 * x[:, token].flip(-1)
        changed, _ = run_plan(rank, plan, order, mask_case.mask, tuple(after))
        sees = allowed[:, token]
        touched = allowed[sees].any(0)  # keys whose gradient comes also from rows that see the token
        assert not sees[:token].any()
        for was, now, may in zip((out, dq, dk, dv), (changed[0], *changed[2:]), (sees, sees, touched, touched)):
            assert torch.equal(was[:, real][:, ~may[here]], now[:, real][:, ~may[here]]), (name, order_name, token)
        assert torch.equal(lse[:, :, real][:, :, ~sees[here]], changed[1][:, :, real][:, :, ~sees[here]])
        felt = (changed[0] != out)[:, real].flatten(2).any(-1)[0]
        assert torch.equal(felt, sees[here]), (name, order_name, token)
        probes += 1
    return probes


@EVERY_PLAN
def test_a_token_is_felt_where_it_is_seen_and_nowhere_else(pool: Pool, case: PlanCase) -> None:
    """Bit for bit: other documents, earlier positions, and rows whose window or block it is not in."""
    assert pool.run(WORLD, change_tokens, case) == [len(CAUSAL_MASKS) * len(ORDERS)] * WORLD


def one_pair(row: int, key: int) -> IntervalMask:
    nothing = torch.zeros(1, LENGTH, dtype=torch.int32)
    begin, end = nothing.clone(), nothing.clone()
    begin[0, row], end[0, row] = key, key + 1
    return IntervalMask(begin, end, nothing, nothing)


def probe_keys(rank: int, world: int, case: PlanCase) -> set[tuple[int, int]]:
    """The loss is the output of one row, which looks at one key: because of the mask, or because of its score."""
    probed = set()
    for turn, order_name in enumerate(ORDERS):
        order = order_case(order_name, LENGTH, world)
        causal = masks.causal(LENGTH)
        dense = plans.build(case.plan, order, causal, HEADS, case.topology)
        pairs = {(owner(order, row), owner(order, key)): (row, key) for row in (44, 43, 31, 22) for key in range(20)}
        for number, ((asker, holder), (row, key)) in enumerate(pairs.items()):
            q, k, v, dout = random_qkv(LENGTH, HEADS, 4)
            dout[:, np.arange(LENGTH) != row] = 0
            if (turn + number) % 2:
                mask = one_pair(row, key)
                plan = plans.build(case.plan, order, mask, HEADS, case.topology)
            else:  # so far above the others that their weights are 0
                q[:, row], k[:, key] = 100.0, 100.0
                mask, plan = causal, dense
            (_, _, dq, dk, dv), _ = run_plan(rank, plan, order, mask, (q, k, v, dout))
            slot = order.positions[rank] == key
            assert bool(slot.any()) == (rank == holder)
            assert bool((dv[:, ~slot] == 0).all() and (dk[:, ~slot] == 0).all()), (order_name, row, key)
            assert bool((dq[:, order.positions[rank] != row] == 0).all())
            if rank == holder:
                expected = dout[:, row].unflatten(1, (HEADS[1], -1)).sum(2)  # every head that reads the key is all its
                assert difference(dv[:, slot][:, 0], expected) < 1e-12
            probed.add((asker, holder))
    return probed


@EVERY_PLAN
def test_a_keys_gradient_lands_on_its_owner_and_nowhere_else(pool: Pool, case: PlanCase) -> None:
    found = pool.run(WORLD, probe_keys, case)
    assert found[0] == set(product(range(WORLD), repeat=2))


def short_rows(rank: int, world: int, every: int) -> tuple[float, set[tuple[str, int]]]:
    """Rows of fewer tokens than ranks, and one whose tokens leave ranks without any: the orders that do so."""
    worst, without = 0.0, set()
    for number, (length, order_name, case) in enumerate(product((1, 3, 5), ORDERS, plan_cases(world))):
        order = order_case(order_name, length, world)
        if not all(order.real(other).any() for other in range(world)):
            without.add((order_name, length))
        for mask_case in mask_cases(length)[number % every :: every]:
            whole = random_qkv(length, HEADS, 4)
            expected = dense_attention(*whole[:3], mask_case.allowed, whole[3])
            plan = plans.build(case.plan, order, mask_case.mask, HEADS, case.topology)
            verify(plan, order, mask_case.mask)
            (out, lse, *gradients), _ = run_plan(rank, plan, order, mask_case.mask, whole)
            empty = torch.from_numpy(~order.real(rank))
            assert bool((lse[:, :, empty] == -torch.inf).all() and (out[:, empty] == 0).all())
            assert all(bool((x[:, empty] == 0).all()) for x in gradients)
            pairs = zip((out, *gradients), (expected[0], *expected[2:]), strict=True)
            worst = max([worst, *(difference(got, order.shard(wanted, rank)) for got, wanted in pairs)])
    return worst, without


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.full)])
def test_ranks_without_tokens_take_their_part(pool: Pool, every: int) -> None:
    """`every` other mask, in turn."""
    results = pool.run(WORLD, short_rows, every)
    assert max(worst for worst, _ in results) < 1e-10
    assert {name for name, _ in results[0][1]} == set(ORDERS)


def one_token_documents(rank: int, world: int) -> float:
    """A token that sees itself alone: out is its value, and no key has to travel."""
    worst = 0.0
    mask = masks.causal(LENGTH, range(LENGTH + 1))
    whole = random_qkv(LENGTH, HEADS, 4)
    for order_name, case in product(ORDERS, plan_cases(world)):
        order = order_case(order_name, LENGTH, world)
        plan = plans.build(case.plan, order, mask, HEADS, case.topology)
        verify(plan, order, mask)
        assert case.plan in ("ulysses", "usp") or not plan.forward.moves
        (out, _, dq, dk, dv), _ = run_plan(rank, plan, order, mask, whole)
        value, dout = (order.shard(x, rank) for x in whole[2:])
        assert torch.equal(out, value.repeat_interleave(HEADS[0] // HEADS[1], 2))
        worst = max(worst, difference(dv, dout.unflatten(2, (HEADS[1], -1)).sum(3)))
        worst = max(worst, *(float(x.abs().max()) for x in (dq, dk)))
    return worst


def test_documents_of_one_token(pool: Pool) -> None:
    assert max(pool.run(WORLD, one_token_documents)) < 1e-12


def ten_thousand_documents(seed: int = 0) -> tuple[list[int], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Documents of 1 to 3 tokens: cumulative lengths, q, k, v and dout, and what they give, each document by itself."""
    sizes = torch.randint(1, 4, (10_000,), generator=torch.Generator().manual_seed(seed))
    bounds = [0, *sizes.cumsum(0).tolist()]
    length, heads = bounds[-1], (2, 1)
    whole = random_qkv(length, heads, 4)
    inside = torch.arange(3)[None] < sizes[:, None]

    def by_document(x: Tensor) -> Tensor:
        apart = x.new_zeros(len(sizes), 3, *x.shape[2:])
        apart[inside] = x[0]
        return apart

    allowed = torch.ones(3, 3, dtype=torch.bool).tril()[None] & inside[:, :, None] & inside[:, None]
    q, k, v, dout = map(by_document, whole)
    out, _, *gradients = dense_attention(q, k, v, allowed, dout)
    return bounds, whole, tuple(x[inside][None] for x in (out, *gradients))


def run_many(rank: int, world: int) -> float:
    bounds, whole, expected = ten_thousand_documents()
    mask, worst = masks.causal(bounds[-1], bounds), 0.0
    for number, case in enumerate(plan_cases(world)):
        order = order_case(ORDERS[number % len(ORDERS)], bounds[-1], world)
        plan = plans.build(case.plan, order, mask, (2, 1), case.topology)
        (out, _, *gradients), _ = run_plan(rank, plan, order, mask, whole)
        pairs = zip((out, *gradients), expected, strict=True)
        worst = max([worst, *(difference(got, order.shard(wanted, rank)) for got, wanted in pairs)])
    return worst


def test_ten_thousand_documents(pool: Pool) -> None:
    assert max(pool.run(WORLD, run_many)) < 1e-10
