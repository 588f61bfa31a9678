"""The executor over NCCL on two GPUs, against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from support.nccl import join
from support.oracle import dense_attention, mask_cases, random_qkv
from support.plan_cases import ORDERS, PlanCase, order_case, plan_cases

from farspan.kernels import attend, attend_backward, masks
from farspan.kernels.index import VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.parallel import execute, orders, plans
from farspan.parallel.execute import attention
from farspan.parallel.prepare import prepare

LENGTH, HEADS, DIM = 515, (4, 2), 64
BACKENDS = {"reference": torch.float64, "triton": torch.bfloat16, "auto": torch.bfloat16}
# Libraries round each partial result to bf16, our kernels keep it in fp32.
MOST = {"triton": 1.1, "auto": 1.5}


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double().cpu() - wanted).norm() / wanted.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_the_reference_backend_on_a_gpu(dtype: torch.dtype, bound: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for case in mask_cases(LENGTH):
        whole = random_qkv(LENGTH, HEADS, DIM, dtype=dtype)
        expected = dense_attention(*whole[:3], case.allowed, whole[3])
        q, k, v, dout = (x.cuda() for x in whole)
        mask = case.mask.to("cuda")
        out, lse = attend(q, k, v, mask, backend="reference")
        gradients = attend_backward(dout, q, k, v, out, lse, mask, backend="reference")
        for got, wanted in zip((out, *gradients), (expected[0], *expected[2:])):
            assert _relative(got, wanted) < bound, case.name


def _errors(rank: int, folder: str) -> None:
    """Error of each backend, mask, plan and order, and of one rank alone, saved by rank 0."""
    join(rank, folder)
    results = {}
    for (backend, dtype), case in product(BACKENDS.items(), mask_cases(LENGTH)):
        whole = random_qkv(LENGTH, HEADS, DIM, dtype=dtype)
        expected = dense_attention(*whole[:3], case.allowed, whole[3])
        layouts = [(PlanCase("single"), orders.contiguous(LENGTH, 1))]
        layouts += [(plan, order_case(order, LENGTH, 2)) for plan, order in product(plan_cases(2), ORDERS)]
        for (name, topology), order in layouts:
            mine = 0 if order.world == 1 else rank
            q, k, v, dout = (order.shard(x, mine).cuda() for x in whole)
            local = [x.requires_grad_() for x in (q, k, v)]
            plan = plans.build(name, order, case.mask, HEADS, topology)
            group = None if order.world == 1 else dist.group.WORLD
            out, _ = attention(*local, prepare(plan, order, case.mask, mine, "cuda"), group, backend=backend)
            out.backward(dout)
            pairs = zip((out.detach(), *(x.grad for x in local)), (expected[0], *expected[2:]))
            errors = torch.tensor(
                [float((got.double().cpu() - order.shard(wanted, mine)).square().sum()) for got, wanted in pairs]
            )
            if order.world == 2:
                errors = errors.cuda()
                dist.all_reduce(errors)
            results[backend, case.name, name, order.name] = errors.sqrt().tolist()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.mark.multigpu
def test_two_gpus_are_as_exact_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_errors, (str(tmp_path),), nprocs=2)
    results = torch.load(tmp_path / "results.pt")
    worst = dict.fromkeys(MOST, 0.0)
    for (backend, case, name, order), errors in results.items():
        if backend == "reference":
            assert max(errors) < 1e-10, (case, name, order)
        else:
            one = results[backend, case, "single", "contiguous"]
            worst[backend] = max(worst[backend], *(a / b for a, b in zip(errors, one)))
    print(f"bf16 error on two GPUs over that on one, at most: {worst}")
    assert all(worst[backend] <= most for backend, most in MOST.items())


def _bits(rank: int, folder: str) -> None:
    """Runs that differ from the first although only the ranks' pace does: plan, order and number of the run."""
    join(rank, folder)
    length, heads, dim, generator = 8192 + 77, (8, 4), 128, torch.Generator("cuda")
    mask = masks.causal(length, [0, 3000, length])
    different = []
    for (name, topology), order_name in product(plan_cases(2), ("contiguous", "zigzag", "striped")):
        order = order_case(order_name, length, 2)
        generator.manual_seed(rank)
        q, k, v, dout = (
            torch.randn(1, order.slots, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
            for n in (8, 4, 4, 8)
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        prepared = prepare(plans.build(name, order, mask, heads, topology), order, mask, rank, "cuda")
        first = None
        for number in range(6):
            pace = Random(10 * number + rank)
            with mock.patch.multiple(execute, **{f.__name__: _late(f, pace) for f in (attend, attend_backward)}):
                out, _ = attention(*inputs, prepared, dist.group.WORLD, backend="deterministic")
                found = [out, *torch.autograd.grad(out, inputs, dout)]
            first = first or found
            if not all(map(torch.equal, first, found)):
                different.append(f"{name}, {order.name}, run {number} of rank {rank}")
    Path(folder, f"different{rank}").write_text("\n".join(different))
    dist.destroy_process_group()


def _wire_bits(rank: int, folder: str) -> None:
    """Runs with a sparse wire that differ from one without, whatever the ranks' pace."""
    join(rank, folder)
    length, heads, dim, generator = 8192, (8, 4), 128, torch.Generator("cuda")
    order, mask = orders.striped(length, 2, TILE), masks.causal(length, [0, 3000, length])
    diagonals = torch.zeros(1, heads[0], length // TILE, dtype=torch.bool)
    diagonals[..., [0, 2, 10]] = diagonals[:, 2, [1, 33]] = True  # odd distances are the other rank's
    columns = torch.tensor([5, 700, 4000, length], dtype=torch.int32).expand(1, heads[0], -1).clone()
    columns[:, 4:] = length
    index = VerticalSlashIndex(diagonals.cuda(), columns.cuda(), length)
    different = []
    for name in ("ring", "all_gather"):
        generator.manual_seed(rank)
        q, k, v, dout = (
            torch.randn(1, order.slots, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
            for n in (8, 4, 4, 8)
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        plan = plans.build(name, order, mask, heads)
        whole, sparse = (
            prepare(plan, order, mask, rank, "cuda", sparse_block=TILE, sparse_wire=wire) for wire in (False, True)
        )
        expected = None
        for number, prepared in enumerate([whole, *[sparse] * 6]):
            pace = Random(10 * number + rank)
            with mock.patch.multiple(execute, **{f.__name__: _late(f, pace) for f in (attend, attend_backward)}):
                out, _ = attention(*inputs, prepared, dist.group.WORLD, index=index)
                found = [out, *torch.autograd.grad(out, inputs, dout)]
            expected = expected or found
            if not all(map(torch.equal, expected, found)):
                different.append(f"{name}, run {number} of rank {rank}")
    Path(folder, f"different{rank}").write_text("\n".join(different))
    dist.destroy_process_group()


def _late(kernel: Callable[..., Any], pace: Random) -> Callable[..., Any]:
    """The kernel, before which its stream sleeps for up to two milliseconds: what is not waited for shows."""

    def run(*args: Any, **options: Any) -> Any:
        torch.cuda._sleep(pace.choice((0, 0, 300_000, 3_000_000)))
        return kernel(*args, **options)

    return run


@pytest.mark.multigpu
def test_the_pace_of_ranks_changes_no_bit(tmp_path: Path) -> None:
    multiprocessing.spawn(_bits, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"different{rank}").read_text() for rank in range(2)] == ["", ""]


@pytest.mark.multigpu
def test_a_sparse_wire_changes_no_bit(tmp_path: Path) -> None:
    multiprocessing.spawn(_wire_bits, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"different{rank}").read_text() for rank in range(2)] == ["", ""]
