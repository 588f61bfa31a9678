"""The attention law: every plan x order x mask x world size equals the dense oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Literal
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support.library import rounding_library
from support.oracle import dense_attention, difference, mask_cases, random_qkv
from support.plan_cases import ORDERS, PlanCase, order_case, plan_cases
from support.pool import Pool
from support.run_plan import run_plan

from farspan.kernels import IntervalMask, accumulation_dtype, attend, attend_backward, masks
from farspan.parallel import orders, plans
from farspan.parallel.execute import _Backward, attention
from farspan.parallel.plan import Schedule
from farspan.parallel.plans import Topology
from farspan.parallel.prepare import prepare
from farspan.parallel.verify import verify

pytestmark = pytest.mark.distributed

WORLDS = (1, 2, 3, 4, 6, 8)
# Query heads that the ranks do not divide, fewer kv heads than ranks, and groups that the shares of heads cut.
HEADS = {1: (6, 2), 2: (4, 1), 3: (4, 2), 4: (6, 2), 6: (4, 4), 8: (6, 3)}


def check_case(rank: int, world: int, length: int, case_name: str, order_name: str, cases: Sequence[PlanCase]) -> float:
    case = next(case for case in mask_cases(length) if case.name == case_name)
    heads, order = HEADS[world], order_case(order_name, length, world)
    whole = random_qkv(length, heads, 4, batch=2)
    expected = dense_attention(*whole[:3], case.allowed, whole[3])
    worst = 0.0
    real = torch.from_numpy(order.real(rank))
    for name, topology in cases:
        plan = plans.build(name, order, case.mask, heads, topology)
        (out, lse, *gradients), sent = run_plan(rank, plan, order, case.mask, whole)
        assert bool((lse[:, :, ~real] == -torch.inf).all())
        pairs = [(out, order.shard(expected[0], rank))]
        pairs += [(lse[:, :, real], order.shard(expected[1], rank, dim=2)[:, :, real])]
        pairs += [(got, order.shard(wanted, rank)) for got, wanted in zip(gradients, expected[2:], strict=True)]
        worst = max([worst, *(difference(got, wanted) for got, wanted in pairs)])
        report = verify(plan, order, case.mask, head_dim=4, batch=2)
        for direction, count in sent.items():
            assert count == report.bytes_sent(direction, 8, 8)[rank], (name, direction)
    return worst


def check_all(rank: int, world: int, length: int, triples: list[tuple[str, str, PlanCase]]) -> dict[str, float]:
    return {
        f"{mask} {order} {case}": check_case(rank, world, length, mask, order, [case]) for mask, order, case in triples
    }


def _check(pool: Pool, world: int, length: int, triples: list[tuple[str, str, PlanCase]]) -> None:
    for errors in pool.run(world, check_all, length, triples):
        assert len(errors) == len(triples)
        assert {name: error for name, error in errors.items() if not error < 1e-10} == {}


def _all(world: int, length: int) -> list[tuple[str, str, PlanCase]]:
    return list(product([case.name for case in mask_cases(length)], ORDERS, plan_cases(world)))


@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_dense_oracle_in_fp64(pool: Pool, world: int) -> None:
    """Every mask x order, every mask x plan and every order x plan; 45 divides by none of the world sizes' chunks."""
    masks_, orders_, plans_ = (list(dict.fromkeys(column)) for column in zip(*_all(world, 45)))
    chosen = [
        (mask, orders_[(i + j) % len(orders_)], plan) for i, mask in enumerate(masks_) for j, plan in enumerate(plans_)
    ]
    _check(pool, world, 45, chosen)


@pytest.mark.full
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [5, 64, 91])
def test_equals_the_dense_oracle_everywhere(pool: Pool, world: int, length: int) -> None:
    _check(pool, world, length, _all(world, length))


def check_batch_masks(rank: int, world: int) -> float:
    """Two rows of a batch with documents of their own, under a plan made for both."""
    length, heads = 45, (4, 2)
    mask = masks.stack([masks.causal(length, [0, 11, 45]), masks.sliding_window(length, 6, 2)])
    allowed = mask.visible(slice(0, length), slice(0, length))
    whole = random_qkv(length, heads, 4, batch=2)
    expected = dense_attention(*whole[:3], allowed, whole[3])
    worst = 0.0
    for order_name, (name, topology) in product(ORDERS, plan_cases(world)):
        order = order_case(order_name, length, world)
        wide = plans.build(name, order, masks.causal(length), heads, topology)  # made for more than the batch sees
        for plan in (plans.build(name, order, mask, heads, topology), wide):
            (out, _, *gradients), _ = run_plan(rank, plan, order, mask, whole)
            for got, wanted in zip((out, *gradients), (expected[0], *expected[2:])):
                worst = max(worst, difference(got, order.shard(wanted, rank)))
    return worst


def test_each_row_of_a_batch_may_have_its_own_mask(pool: Pool) -> None:
    assert max(pool.run(3, check_batch_masks)) < 1e-10


def check_less(rank: int, world: int, case: PlanCase) -> float:
    """A batch whose mask sees less than the plan was made for: some results are sent of which nothing was computed."""
    length, heads = 64, (4, 2)
    order, batch = orders.zigzag(length, world), masks.sliding_window(length, 5)
    plan = plans.build(case.plan, order, masks.causal(length), heads, case.topology)
    whole = random_qkv(length, heads, 4)
    expected = dense_attention(*whole[:3], batch.visible(slice(0, length), slice(0, length)), whole[3])
    (out, _, *gradients), _ = run_plan(rank, plan, order, batch, whole)
    pairs = zip((out, *gradients), (expected[0], *expected[2:]), strict=True)
    return max(difference(got, order.shard(wanted, rank)) for got, wanted in pairs)


@pytest.mark.parametrize("case", plan_cases(4), ids=str)
def test_a_batch_may_see_less_than_the_plan(pool: Pool, case: PlanCase) -> None:
    assert max(pool.run(4, check_less, case)) < 1e-10


def dtypes_of_sums(rank: int, world: int, case: PlanCase, order_name: str) -> set[str]:
    length, heads = 256, (4, 2)
    order, mask = order_case(order_name, length, world), masks.sliding_window(length, 40, 4)
    plan = plans.build(case.plan, order, mask, heads, case.topology, "bf16")
    seen = set()
    combine = _Backward.combine

    def watch(self: _Backward, total: tuple[torch.Tensor, ...], tensors: tuple[torch.Tensor, ...]) -> None:
        seen.update(str(x.dtype) for x in total)
        combine(self, total, tensors)

    with patch.object(_Backward, "combine", watch):
        run_plan(rank, plan, order, mask, random_qkv(length, heads, 16, dtype=torch.bfloat16))
    return seen


@pytest.mark.parametrize("order", ["zigzag", "two_class"])
def test_sums_are_fp32_also_on_a_narrow_wire(pool: Pool, order: str) -> None:
    """In a hierarchical ring a sum arrives at a rank that has computed nothing of its own yet."""
    found = pool.run(8, dtypes_of_sums, PlanCase("hierarchical_ring", Topology(inner=2)), order)
    assert set().union(*found) == {"torch.float32"}


def check_kept(rank: int, world: int) -> float:
    """Keys and values kept from the forward pass need no second journey."""
    length, heads = 45, (4, 2)
    order, mask = orders.zigzag(length, world), masks.causal(length)
    plan = plans.build("ring", order, mask, heads)
    kept = frozenset((move.dst, move.block) for move in plan.forward.moves)
    homeward = Schedule(tuple(m for m in plan.backward.moves if m.home), plan.backward.pieces)
    plan = replace(plan, backward=homeward, kept=kept)
    verify(plan, order, mask)
    whole = random_qkv(length, heads, 4)
    expected = dense_attention(*whole[:3], mask.visible(slice(0, length), slice(0, length)), whole[3])
    (out, _, *gradients), _ = run_plan(rank, plan, order, mask, whole)
    pairs = zip((out, *gradients), (expected[0], *expected[2:]))
    return max(difference(got, order.shard(wanted, rank)) for got, wanted in pairs)


def test_kept_operands_are_used_again(pool: Pool) -> None:
    assert max(pool.run(4, check_kept)) < 1e-10


def bf16_errors(
    rank: int,
    world: int,
    mask_name: Literal["causal", "full"],
    cases: list[tuple[str, PlanCase]],
    wire: Literal["fp32", "bf16"] = "fp32",
    backend: str = "reference",
) -> list[list[float]]:
    """For each order and plan the error of out, dq, dk, dv against fp64: root of the sum of squares over all rows."""
    length, heads = 512, (4, 2)
    mask = {"causal": masks.causal, "full": masks.full}[mask_name](length)
    q, k, v, dout = random_qkv(length, heads, 16, batch=4, dtype=torch.bfloat16)
    # How large a rounding error is depends on where between two powers of two a number is: this averages over it.
    scales = 2 ** (torch.arange(4)[:, None, None, None] / 4)
    whole = q, k, (v * scales).bfloat16(), (dout * scales).bfloat16()
    expected = dense_attention(*whole[:3], mask.visible(slice(0, length), slice(0, length)), whole[3])
    found = []
    with rounding_library() as library:
        for order_name, case in cases:
            order = order_case(order_name, length, world)
            plan = plans.build(case.plan, order, mask, heads, case.topology, wire)
            (out, _, *gradients), _ = run_plan(rank, plan, order, mask, whole, backend=backend)
            pairs = zip((out, *gradients), (expected[0], *expected[2:]), strict=True)
            squares = [(got.double() - order.shard(wanted, rank)).square().sum() for got, wanted in pairs]
            found.append(torch.stack(squares))
    assert bool(library.calls) == (backend == "cudnn")
    errors = torch.stack(found)
    dist.all_reduce(errors)
    return errors.sqrt().tolist()


ALONE = [("contiguous", PlanCase("single"))]


def test_bf16_error_does_not_grow_with_the_world(pool: Pool) -> None:
    """Partial results and travelling gradients are fp32, so only the last rounding to bf16 remains."""
    cases = list(product(("zigzag", "two_class"), plan_cases(8)))
    (alone,) = pool.run(1, bf16_errors, "causal", ALONE)[0]
    for case, shared in zip(cases, pool.run(8, bf16_errors, "causal", cases)[0], strict=True):
        assert all(many <= 1.02 * one for one, many in zip(alone, shared, strict=True)), case


def test_bf16_error_with_library_kernels_is_flat_in_the_world(pool: Pool) -> None:
    """Each call's result is rounded, and so is the fp32 sum of them: two roundings in place of one, at any world size.

    Of independent roundings that is sqrt(2); a little more where two equal halves meet, whose sum is often a tie. With
    a full mask every row and key is put together of what all ranks computed, and no part outweighs the others.
    """
    (alone,) = pool.run(1, bf16_errors, "full", ALONE, "fp32", "cudnn")[0]
    growth: dict[int, dict[str, float]] = {}
    for world in (2, 4, 8):
        cases = list(product(("zigzag", "two_class"), plan_cases(world)))
        found = pool.run(world, bf16_errors, "full", cases, "fp32", "cudnn")[0]
        growth[world] = {case.plan: 1.0 for _, case in cases}
        for (_, case), shared in zip(cases, found, strict=True):
            worst = max(many / one for one, many in zip(alone, shared, strict=True))
            growth[world][case.plan] = max(growth[world][case.plan], worst)
        assert max(growth[world].values()) <= 1.5, growth
    for name in growth[4]:
        assert 1.3 < growth[8][name] <= 1.02 * growth[4][name], (name, growth)


def test_a_narrow_wire_for_gradients_costs_what_it_says(pool: Pool) -> None:
    """bf16 rounds a travelling sum at every hop, and only gradients of keys and values travel in a ring."""
    ring = [("zigzag", PlanCase("ring"))]
    wide, narrow = (pool.run(8, bf16_errors, "causal", ring, wire)[0][0] for wire in ("fp32", "bf16"))
    assert narrow[:2] == wide[:2]
    for one, many in zip(wide[2:], narrow[2:], strict=True):
        assert 1.2 * one < many < 4 * one


def heads_probe(rank: int, world: int) -> float:
    """One row alone sees one remote key: its gradient lands on that key's owner, nowhere else."""
    length, heads = 32, (4, 2)
    order = orders.striped(length, world, 4)
    nothing = torch.zeros(1, length, dtype=torch.int32)
    begin, end = nothing.clone(), nothing.clone()
    begin[0, 30], end[0, 30] = 5, 6
    mask = IntervalMask(begin, end, nothing, nothing)
    whole = random_qkv(length, heads, 4)
    plan = plans.build("ring", order, mask, heads)
    (out, _, _, _, dv), _ = run_plan(rank, plan, order, mask, whole)
    holds = order.positions[rank] == 5
    expected = torch.zeros_like(dv)
    expected[:, holds] = whole[3][:, 30].unflatten(1, (2, 2)).sum(2)[:, None]
    assert len(plan.forward.moves) == (5 // 4 % world != 30 // 4 % world)
    rows = torch.from_numpy(order.positions[rank] != 30)
    assert bool((out[:, rows] == 0).all())
    return difference(dv, expected)


def test_a_gradient_lands_on_its_owner(pool: Pool) -> None:
    assert max(pool.run(3, heads_probe)) < 1e-12


def test_one_rank_equals_the_kernel_itself() -> None:
    length, heads = 40, (4, 2)
    mask = masks.causal(length, [0, 13, 40])
    order = orders.contiguous(length, 1)
    q, k, v, dout = random_qkv(length, heads, 8, dtype=torch.float32)
    local = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*local, prepare(plans.build("single", order, mask, heads), order, mask, 0), None)
    out.backward(dout)
    expected = attend(q, k, v, mask)
    assert difference(out, expected[0]) < 1e-6
    assert difference(lse, expected[1]) < 1e-6
    for got, wanted in zip(local, attend_backward(dout, q, k, v, *expected, mask)):
        assert difference(got.grad, wanted) < 1e-6
    assert accumulation_dtype(torch.bfloat16) == torch.float32


def test_single_refuses_a_shared_row() -> None:
    order = orders.zigzag(16, 2)
    with pytest.raises(ValueError, match=r"parallel.context is 2; take 'ring'"):
        plans.build("single", order, masks.causal(16), (2, 2))
    with pytest.raises(ValueError, match=r"parallel.plan is 'round'; possible are single, ring, hierarchical_ring"):
        plans.build("round", order, masks.causal(16), (2, 2))
    with pytest.raises(
        ValueError, match=r"usp divides 2 ranks by parallel.ulysses, which is not given; possible are 1, 2"
    ):
        plans.build("usp", order, masks.causal(16), (2, 2))
    with pytest.raises(ValueError, match=r"by parallel.inner, which is 3; possible are 1, 2"):
        plans.build("hierarchical_ring", order, masks.causal(16), (2, 2), Topology(inner=3))
