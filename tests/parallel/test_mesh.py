"""The mesh: groups by purpose, and plans that run inside a group that is not the world."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.oracle import dense_attention, difference, random_qkv
from support.plan_cases import ORDERS, PlanCase, order_case, plan_cases
from support.pool import Pool
from support.run_plan import run_plan

from farspan.kernels import masks
from farspan.parallel import plans
from farspan.parallel.degrees import Degrees, MeshError
from farspan.parallel.plans import Topology


def test_the_data_degree_is_what_is_left() -> None:
    degrees = Degrees.divide(24, context=3, tensor=2)
    assert (degrees.data, degrees.context, degrees.tensor) == (4, 3, 2)
    assert (degrees.world, degrees.shard) == (24, 12)
    assert str(degrees) == "data 4 x context 3 x tensor 2"


def test_an_impossible_division_names_the_nearest_possible_ones() -> None:
    with pytest.raises(MeshError) as caught:
        Degrees.divide(6, context=2, tensor=2)
    assert str(caught.value) == (
        "6 processes cannot be divided into parallel.context 2 x parallel.tensor 2; possible are "
        "context 1 x tensor 2, context 3 x tensor 2, context 2 x tensor 1 with 6 processes, "
        "or these degrees with 4 or 8 processes (launch.processes)"
    )


def test_with_too_few_processes_only_more_are_offered() -> None:
    with pytest.raises(MeshError, match=r"or these degrees with 4 processes \(launch\.processes\)$"):
        Degrees.divide(2, context=4, tensor=1)


@pytest.mark.parametrize("counts", [(0, 1, 1), (4, 0, 1), (4, 1, -1)])
def test_degrees_below_one_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(MeshError, match=r"parallel\.context .* and parallel\.tensor .* must be 1 or more"):
        Degrees.divide(*counts)


GROUPS = ("batch", "loss", "shard", "context", "tensor", "control")


def groups(rank: int, world: int, data: int, context: int, tensor: int) -> dict[str, Any]:
    """The global ranks of each of this rank's groups, and its places."""
    from farspan.parallel.mesh import Mesh

    mesh = Mesh.create(Degrees(data, context, tensor), torch.device("cpu"))
    try:
        found: dict[str, Any] = {name: dist.get_process_group_ranks(getattr(mesh, name)) for name in GROUPS}
        return found | {"places": (mesh.data_rank, mesh.context_rank, mesh.tensor_rank)}
    finally:
        mesh.destroy()


def narrower_groups(rank: int, world: int, data: int, context: int, tensor: int) -> dict[int, dict[str, Any]]:
    """`groups` of a mesh's narrower ones, and what goes round in each: the sum of its ranks."""
    from farspan.parallel.mesh import Mesh

    narrower = [c for c in (1, 2, 4) if c < context]
    mesh = Mesh.create(Degrees(data, context, tensor), torch.device("cpu"), outer_link=True, narrower=narrower)
    found: dict[int, dict[str, Any]] = {}
    try:
        for degree in narrower:
            narrow = mesh.with_context(degree)
            found[degree] = {name: dist.get_process_group_ranks(getattr(narrow, name)) for name in GROUPS}
            found[degree]["places"] = (narrow.data_rank, narrow.context_rank, narrow.tensor_rank)
            found[degree]["degrees"] = str(narrow.degrees)
            assert narrow.shard is mesh.shard
            assert narrow.links["outer"] is not narrow.context
            for group in (narrow.context, narrow.links["outer"], narrow.batch):
                total = torch.tensor(float(rank))
                dist.all_reduce(total, group=group)
                assert total == sum(dist.get_process_group_ranks(group))
        assert mesh.with_context(context) is mesh
        return found
    finally:
        mesh.destroy()


@pytest.mark.distributed
@pytest.mark.parametrize(("data", "context", "tensor"), [(1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_narrower_meshes_are_of_the_same_ranks(pool: Pool, data: int, context: int, tensor: int) -> None:
    """Ranks count tensor first, then context, then data, with each of the degrees."""
    for rank, by_degree in enumerate(pool.run(4, narrower_groups, data, context, tensor)):
        for degree, of_rank in by_degree.items():
            t, c, d = rank % tensor, rank // tensor % degree, rank // tensor // degree
            shard = [t + tensor * i for i in range(data * context)]
            assert of_rank["places"] == (d, c, t)
            assert of_rank["degrees"] == f"data {data * context // degree} x context {degree} x tensor {tensor}"
            assert of_rank["context"] == shard[d * degree : (d + 1) * degree]
            assert of_rank["batch"] == shard[c::degree]
            assert sorted(of_rank["shard"]) == shard


def check_groups(pool: Pool, data: int, context: int, tensor: int) -> list[dict[str, Any]]:
    """Against the sentence "ranks count tensor first, then context, then data"."""
    world = data * context * tensor
    found = pool.run(world, groups, data, context, tensor)
    for rank, of_rank in enumerate(found):
        t, c, d = rank % tensor, rank // tensor % context, rank // tensor // context

        def at(d: int, c: int, t: int) -> int:
            return t + tensor * (c + context * d)

        assert of_rank["places"] == (d, c, t)
        assert of_rank["tensor"] == [at(d, c, i) for i in range(tensor)]
        assert of_rank["context"] == [at(d, i, t) for i in range(context)]
        assert of_rank["batch"] == [at(i, c, t) for i in range(data)]
        assert sorted(of_rank["loss"]) == [at(i, j, t) for i in range(data) for j in range(context)]
        assert of_rank["shard"] == of_rank["loss"]
        assert of_rank["control"] == list(range(world))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("data", "context", "tensor"), [(2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1), (4, 1, 1)])
def test_groups_of_four_ranks(pool: Pool, data: int, context: int, tensor: int) -> None:
    check_groups(pool, data, context, tensor)


def timeouts(rank: int, world: int) -> set[float]:
    """Seconds, of all groups."""
    from farspan.parallel.mesh import Mesh

    mesh = Mesh.create(Degrees(1, world, 1), torch.device("cpu"), outer_link=True)
    groups = [dist.group.WORLD, *(getattr(mesh, name) for name in GROUPS), *mesh.links.values()]
    found = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    mesh.destroy()
    return found


@pytest.mark.distributed
def test_all_groups_have_the_timeout_of_the_default_group(pool: Pool) -> None:
    assert [len(of_rank) for of_rank in pool.run(2, timeouts)] == [1, 1]


@pytest.mark.distributed
def test_groups_of_eight_ranks(pool: Pool) -> None:
    found = check_groups(pool, data=2, context=2, tensor=2)
    assert found[5]["tensor"] == [4, 5]
    assert found[5]["context"] == [5, 7]
    assert found[5]["batch"] == [1, 5]
    assert sorted(found[5]["loss"]) == [1, 3, 5, 7]
    assert found[5]["control"] == [0, 1, 2, 3, 4, 5, 6, 7]


def attention_in_groups(rank: int, world: int, context: int, tensor: int) -> tuple[float, int, list[int]]:
    """Each context group has a row of its own, and each tensor rank its heads of it.

    The worst difference to the oracle over all plans and orders, their number, and the group's global ranks.
    """
    from farspan.parallel.mesh import Mesh

    length, heads = 45, (4, 2)
    mesh = Mesh.create(Degrees(world // (context * tensor), context, tensor), torch.device("cpu"), outer_link=True)
    cases = plan_cases(context)
    if context == 2:  # each of the two hops is one between nodes, or neither is
        cases += [PlanCase("hierarchical_ring", Topology(inner=inner)) for inner in (1, 2)]
        cases += [PlanCase("usp", Topology(inner=1, ulysses=ulysses)) for ulysses in (1, 2)]
    worst, place = 0.0, mesh.context_rank
    cu_seqlens = [0, 1, 17 + mesh.data_rank, length]
    mask = masks.causal(length, cu_seqlens)
    document = torch.bucketize(torch.arange(length), torch.tensor(cu_seqlens[1:]), right=True)
    allowed = (document[:, None] == document[None]) & torch.ones(length, length).tril().bool()
    q, k, v, dout = random_qkv(length, (tensor * heads[0], tensor * heads[1]), 4, seed=mesh.data_rank)
    expected = dense_attention(q, k, v, allowed[None], dout)
    mine = [x.chunk(tensor, 2)[mesh.tensor_rank] for x in (q, k, v, dout)]
    wanted = [x.chunk(tensor, 2)[mesh.tensor_rank] for x in (expected[0], *expected[2:])]
    try:
        for order_name, case in product(ORDERS, cases):
            order = order_case(order_name, length, context)
            plan = plans.build(case.plan, order, mask, heads, case.topology)
            (out, _, *gradients), _ = run_plan(place, plan, order, mask, tuple(mine), mesh.links)
            for got, whole in zip((out, *gradients), wanted, strict=True):
                worst = max(worst, difference(got, order.shard(whole, place)))
        return worst, len(cases), dist.get_process_group_ranks(mesh.context)
    finally:
        mesh.destroy()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "context", "tensor", "last_group"),
    [(4, 2, 1, [2, 3]), (4, 2, 2, [1, 3]), (8, 2, 2, [5, 7]), (8, 4, 1, [4, 5, 6, 7])],
)
def test_every_plan_runs_inside_a_group_that_is_not_the_world(
    pool: Pool, world: int, context: int, tensor: int, last_group: list[int]
) -> None:
    """A plan's ranks are places in the group, the executor's peers are global ranks."""
    results = pool.run(world, attention_in_groups, context, tensor)
    assert results[-1][2] == last_group
    assert results[-1][1] == (9 if context == 2 else 7)
    assert max(worst for worst, _, _ in results) < 1e-10


def wrong_world(rank: int, world: int) -> str:
    from farspan.parallel.mesh import Mesh

    with pytest.raises(MeshError) as caught:
        Mesh.create(Degrees(1, 2, 2), torch.device("cpu"))
    return str(caught.value)


@pytest.mark.distributed
def test_a_mesh_of_another_number_of_processes_is_refused(pool: Pool) -> None:
    message = "data 1 x context 2 x tensor 2 is a mesh of 4 processes, but 2 were started"
    assert pool.run(2, wrong_world) == [message] * 2
