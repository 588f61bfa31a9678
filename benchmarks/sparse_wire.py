"""What does `parallel.sparse_wire` leave at home, and what does it cost? Counted for any ranks, timed on those here.

    python benchmarks/sparse_wire.py --worlds 8,32,64
    python benchmarks/sparse_wire.py --gpus 2 --length 131072

Without `--gpus` bytes are counted on the host, forward and backward together, as shares of what dense attention sends
on striped order. With it one layer's attention is timed on so many GPUs, without and with a sparse wire, and on one GPU
alone; `scaling` is one GPU's time over (the slowest rank's x ranks). Heads are those of Qwen2.5-3B. Indexes are drawn:
each head has the nearest diagonals and others log-uniform in distance, the first 30 keys and columns anywhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from farspan.kernels import masks
from farspan.kernels.index import VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.parallel import orders, plans
from farspan.parallel.execute import attention
from farspan.parallel.prepare import prepare
from farspan.parallel.sieve import Sieve, bytes_sent
from farspan.parallel.streams import transfer_options

HEADS, HEAD_DIM = (16, 2), 128
PLANS = ("ring", "all_gather")
_ROUNDS = 5


class Pattern(NamedTuple):
    """What each head has: the nearest diagonals, others, and columns, the first 30 keys among them."""

    nearest: int
    others: int
    columns: int

    def __str__(self) -> str:
        return f"{self.nearest} nearest, {self.others} others, {self.columns} columns"


PATTERNS = (Pattern(8, 0, 30), Pattern(8, 0, 512), Pattern(2, 16, 512), Pattern(2, 60, 1000), Pattern(2, 200, 1000))


def draw(pattern: Pattern, length: int) -> VerticalSlashIndex:
    generator, blocks = np.random.default_rng(0), length // TILE
    diagonals = torch.zeros(1, HEADS[0], blocks, dtype=torch.bool)
    diagonals[..., : pattern.nearest] = True
    columns = torch.full((1, HEADS[0], pattern.columns), length, dtype=torch.int32)
    for head in range(HEADS[0]):
        distances = np.exp(generator.uniform(0, np.log(blocks), pattern.others)).astype(int)
        diagonals[0, head, distances] = True
        keys = np.unique(np.append(np.arange(30), generator.integers(0, length, pattern.columns - 30)))
        columns[0, head, : len(keys)] = torch.from_numpy(keys.astype(np.int32))
    return VerticalSlashIndex(diagonals, columns, length)


def count(length: int, worlds: list[int]) -> None:
    print(f"{length:,} tokens, {HEADS[0]} heads over {HEADS[1]} x {HEAD_DIM}, bf16: share of the bytes that are sent")
    print(f"{'each head has':<40}{'tiles':>8}" + "".join(f"{f'{plan} {w}':>15}" for w in worlds for plan in PLANS))
    mask = masks.causal(length)
    sieves = []
    for world in worlds:
        order = orders.striped(length, world, TILE)
        sieves += [Sieve(plans.build(plan, order, mask, HEADS), order, mask, 0, TILE, "cpu") for plan in PLANS]
    for pattern in PATTERNS:
        index = draw(pattern, length)
        line = f"{pattern!s:<40}{float(index.density().mean()):>8.2%}"
        for sieve in sieves:
            sent, whole = bytes_sent(sieve, index, HEAD_DIM, 1, 2)
            line += f"{sent / whole:>15.3f}"
        print(line, flush=True)


def time_on(rank: int, folder: str, gpus: int, length: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{folder}/s", rank=rank, world_size=gpus)
    group = dist.new_group(list(range(gpus)), pg_options=transfer_options(device))
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    if rank == 0:
        print(f"{length:,} tokens, milliseconds of the slowest of {gpus} ranks, median of {_ROUNDS} runs")
        print(f"{'each head has':<40}{'plan':<12}{'wire':<8}{'forward':>9}{'backward':>10}{'scaling':>9}{'MB sent':>9}")
    for pattern in PATTERNS:
        index, alone = draw(pattern, length), 0.0
        for plan, wire, world in [("single", False, 1), *((p, w, gpus) for p in PLANS for w in (False, True))]:
            if rank == 0 or world > 1:
                times, sent = one_layer(index, plan, wire, rank, world, group, device)
                alone = alone or sum(times)
                scaling = alone / (sum(times) * world)
                if rank == 0:
                    name = "sparse" if wire else "dense"
                    figures = f"{times[0]:>9.2f}{times[1]:>10.2f}{scaling:>9.3f}{sent / 1e6:>9.1f}"
                    print(f"{pattern!s:<40}{plan:<12}{name:<8}{figures}", flush=True)
            if world == 1:
                shared = torch.tensor(alone, device=device)
                dist.broadcast(shared, 0, group=group)
                alone = float(shared)
    dist.destroy_process_group()


def one_layer(
    index: VerticalSlashIndex,
    plan_name: str,
    wire: bool,
    rank: int,
    world: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[list[float], int]:
    """Milliseconds forward and backward on the slowest rank, and the bytes that all ranks send."""
    length = index.length
    order, mask = orders.striped(length, world, TILE), masks.causal(length)
    plan = plans.build(plan_name, order, mask, HEADS)
    prepared = prepare(plan, order, mask, rank, device, sparse_block=TILE, sparse_wire=wire)
    here = VerticalSlashIndex(index.diagonals.to(device), index.columns.to(device), length)
    generator = torch.Generator(device).manual_seed(rank)
    q, k, v, dout = (
        torch.randn(1, order.slots, n, HEAD_DIM, dtype=torch.bfloat16, device=device, generator=generator)
        for n in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    graph: list[torch.Tensor] = []

    def forward() -> None:
        # Another index object each time, as in training: nothing is known of it yet.
        fresh = VerticalSlashIndex(here.diagonals, here.columns, length)
        graph[:] = [attention(*inputs, prepared, None if world == 1 else group, index=fresh)[0]]

    def backward() -> None:
        torch.autograd.grad(graph[0], inputs, dout, retain_graph=True)

    found = []
    for run in (forward, backward):
        run()
        seconds = torch.tensor(
            statistics.median(_timed(run, world, group, device) for _ in range(_ROUNDS)), device=device
        )
        if world > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
        found.append(1e3 * float(seconds))
    if world == 1:
        return found, 0
    sent, whole = bytes_sent(Sieve(plan, order, mask, rank, TILE, device), here, HEAD_DIM, 1, 2)
    return found, sent if wire else whole


def _timed(run: Callable[[], None], world: int, group: dist.ProcessGroup, device: torch.device) -> float:
    if world > 1:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    _synchronize(device)
    begin = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=524_288)
    parser.add_argument("--worlds", default="8,32,64", help="numbers of ranks, with commas")
    parser.add_argument("--gpus", type=int, help="time it on so many GPUs, or processes where there are none")
    arguments = parser.parse_args()
    if arguments.gpus is None:
        count(arguments.length, [int(world) for world in arguments.worlds.split(",")])
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(time_on, (folder, arguments.gpus, arguments.length), nprocs=arguments.gpus)


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    main()
