"""Sparse attention over NCCL on two GPUs: the oracle's results, one device's index, and ranks' pace changes no bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from support.index_cases import index_cases
from support.nccl import join
from support.oracle import dense_attention, mask_cases, random_qkv

from farspan.kernels import masks
from farspan.kernels.estimate import VerticalSlash
from farspan.kernels.index import VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.parallel import orders, plans
from farspan.parallel.estimate import Estimator
from farspan.parallel.execute import attention
from farspan.parallel.prepare import prepare

LENGTH, HEADS, DIM = 1000, (4, 2), 64
PLANS = ("ring", "all_gather", "ulysses")
BACKENDS = {"reference": torch.float64, "triton": torch.bfloat16}


def _errors(rank: int, folder: str) -> None:
    join(rank, folder)
    results = {}
    indexes = {case.name: case for case in index_cases(LENGTH, HEADS[0], TILE)}
    of_masks = {case.name: case for case in mask_cases(LENGTH)}
    cases = product(BACKENDS.items(), ("some", "columns alone"), ("causal", "documents"), ("single", *PLANS))
    for (backend, dtype), index_name, mask_name, name in cases:
        case, mask = indexes[index_name], of_masks[mask_name]
        whole = random_qkv(LENGTH, HEADS, DIM, dtype=dtype)
        expected = dense_attention(*whole[:3], case.selected & mask.allowed[:, None], whole[3])
        world = 1 if name == "single" else 2
        order = orders.striped(LENGTH, world, TILE)
        mine = rank % world
        q, k, v, dout = (order.shard(x, mine).cuda() for x in whole)
        local = [x.requires_grad_() for x in (q, k, v)]
        index = VerticalSlashIndex(case.index.diagonals.cuda(), case.index.columns.cuda(), LENGTH)
        plan = plans.build(name, order, mask.mask, HEADS)
        prepared = prepare(plan, order, mask.mask, mine, "cuda", sparse_block=TILE)
        found = []
        for _ in range(2):
            group = None if world == 1 else dist.group.WORLD
            out, _ = attention(*local, prepared, group, index=index, backend=backend)
            found.append([out.detach(), *torch.autograd.grad(out, local, dout)])
        assert all(map(torch.equal, *found)), (backend, index_name, mask_name, name)
        errors = torch.stack(
            [
                (got.double() - order.shard(wanted, mine).cuda()).square().sum()
                for got, wanted in zip(found[0], (expected[0], *expected[2:]))
            ]
        )
        if world == 2:
            dist.all_reduce(errors)
        results[backend, index_name, mask_name, name] = errors.sqrt().tolist()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.mark.multigpu
def test_two_gpus_are_as_exact_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_errors, (str(tmp_path),), nprocs=2)
    worst = 0.0
    results = torch.load(tmp_path / "results.pt")
    for (backend, *case, plan), errors in results.items():
        if backend == "reference":
            assert max(errors) < 1e-10, (case, plan)
        else:
            one = results[(backend, *case, "single")]
            worst = max(worst, *(a / b for a, b in zip(errors, one)))
    print(f"bf16 error on two GPUs over that on one, at most: {worst}")
    assert worst <= 1.1


def _indexes(rank: int, folder: str) -> None:
    """The index of 40,960 tokens in three orders, and of one device, saved by each rank."""
    join(rank, folder)
    length, heads = 40_960, (8, 2)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(1, length, n, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for n in heads)
    found = []
    for order in (orders.contiguous(length, 1), orders.striped(length, 2, TILE), orders.zigzag(length, 2)):
        mine, group = (0, None) if order.world == 1 else (rank, dist.group.WORLD)
        estimator = Estimator(order, masks.causal(length), VerticalSlash(segments=2), mine, group, "cuda")
        index, _ = estimator(order.shard(q.cpu(), mine).cuda(), order.shard(k.cpu(), mine).cuda())
        found.append((index.diagonals.cpu(), index.columns.cpu()))
    torch.save(found, f"{folder}/index{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multigpu
def test_two_gpus_choose_what_one_would(tmp_path: Path) -> None:
    multiprocessing.spawn(_indexes, (str(tmp_path),), nprocs=2)
    one, *others = (index for rank in range(2) for index in torch.load(tmp_path / f"index{rank}.pt"))
    assert all(torch.equal(x, y) for index in others for x, y in zip(index, one, strict=True))
