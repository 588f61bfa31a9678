"""How well do the ranks that share a sequence share its work? Every plan x mask on 1, 2 and more GPUs of one machine.

    python benchmarks/context_parallel.py --gpus 1,2 --length 131072 --output context_parallel.jsonl

TFLOP/s a GPU are the visible pairs' FLOPs over (the slowest rank's time x ranks): the metric, and with causal and
document masks the cases, of LongCA-bench (arXiv:2510.17896). `scaling` is one GPU's time over (time x ranks), on the
same total work. `exposed` is the share of the time in which no kernel computes, on the rank where it is smallest: the
one that the others wait for. `idle` is that share on the rank where it is largest.

    python benchmarks/context_parallel.py --density 0.05 --heads 16 --kv-heads 2 --plans ring,ulysses

is sparse attention with the index of `sparse_attention.py`, in striped order: pairs are those that are computed, and of
the kernels' measured times `worker` is the busiest rank over the mean, `lockstep` the sum over stages of the slowest
rank's over it. With `--sparse-wire` what is not selected is not sent, and `sent` are the bytes that are, over those of
dense attention, in both directions. Without GPUs it runs over gloo on CPUs with the reference backend, for trying the
script out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from attention_cases import make_mask
from sparse_attention import drawn_index
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from farspan.kernels import IntervalMask
from farspan.kernels.tiles import TILE
from farspan.parallel import execute, index_work, orders, plans
from farspan.parallel.execute import attention
from farspan.parallel.orders import Order
from farspan.parallel.plans import Topology
from farspan.parallel.prepare import prepare
from farspan.parallel.sieve import bytes_sent
from farspan.parallel.streams import transfer_options
from farspan.parallel.verify import verify

MASKS = ("causal", "documents", "window", "star")
# The order on which a plan is at its best.
ORDERS = {"ulysses": "contiguous", "star": "two_class"}
DIRECTIONS = ("forward", "backward")
_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    length: int
    heads: tuple[int, int]
    head_dim: int
    masks: tuple[str, ...]
    plans: tuple[str, ...]
    gpus: tuple[int, ...]
    gradient_wire: str
    backend: str
    trace: Path | None
    density: float | None
    columns: int
    sparse_wire: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072, help="tokens of the whole row")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--masks", type=_names, default=MASKS)
    parser.add_argument("--plans", type=_names, default=plans.PLANS[1:])
    parser.add_argument("--gpus", type=_numbers, default=(1, 2), help="numbers of GPUs, with commas")
    parser.add_argument("--gradient-wire", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--backend", default="triton" if torch.cuda.is_available() else "reference")
    parser.add_argument("--density", type=float, help="sparse attention on this share of the causal tiles")
    parser.add_argument("--columns", type=int, default=512, help="single keys of a head, with --density")
    parser.add_argument("--sparse-wire", action="store_true", help="with --density: send what is selected alone")
    parser.add_argument("--trace", type=Path, help="folder for a trace of each case and rank (chrome://tracing)")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    options = parser.parse_args()
    if options.sparse_wire and options.density is None:
        parser.error("--sparse-wire leaves out what an index does not select: give --density")
    heads = options.heads, options.kv_heads
    settings = Settings(
        options.length,
        heads,
        options.head_dim,
        options.masks if options.density is None else ("causal",),
        options.plans,
        options.gpus,
        options.gradient_wire,
        options.backend,
        options.trace,
        options.density,
        options.columns,
        options.sparse_wire,
    )
    print_head(settings)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (folder, settings), nprocs=max(options.gpus))
        rows = [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run_rank(rank: int, folder: str, settings: Settings) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    world = max(settings.gpus)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=world)
    options = transfer_options(device)
    groups = {n: dist.new_group(list(range(n)), pg_options=options) for n in sorted({*settings.gpus, world})}
    for n, group in groups.items():
        if rank < n:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    for mask in settings.masks:
        alone: dict[str, float] = {}
        for case in cases(settings, mask):
            if rank < case.gpus:
                row = measure(case, settings, rank, groups[case.gpus], device)
                if case.gpus == 1:
                    alone = {d: row[f"{d}_ms"] for d in DIRECTIONS}
                for direction in DIRECTIONS if alone else ():
                    row[f"{direction}_scaling"] = alone[direction] / (row[f"{direction}_ms"] * case.gpus)
                if rank == 0:
                    print(line(row), flush=True)
                    with (Path(folder) / "rows.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
            dist.all_reduce(torch.zeros(1, device=device), group=groups[world])
    dist.destroy_process_group()


@dataclass(frozen=True, eq=False)
class Case:
    plan: str
    mask_name: str
    gpus: int
    mask: IntervalMask
    order: Order
    topology: Topology


def cases(settings: Settings, mask_name: str) -> Iterator[Case]:
    """One GPU first: what the others are compared with."""
    length = settings.length
    mask, _, _ = make_mask(mask_name, length, torch.device("cpu"))
    for gpus in sorted(settings.gpus):
        if gpus == 1:
            yield Case("single", mask_name, 1, mask, orders.contiguous(length, 1), Topology())
            continue
        for plan in settings.plans:
            if gpus < 4 and plan in ("hierarchical_ring", "usp"):  # would be one of the others
                continue
            topology = Topology(inner=gpus // 2 if plan == "hierarchical_ring" else None, ulysses=gpus // 2)
            sparse = settings.density is not None
            order = orders.striped(length, gpus, TILE) if sparse else _order(plan, mask_name, length, gpus)
            yield Case(plan, mask_name, gpus, mask, order, topology)


def _order(plan: str, mask_name: str, length: int, gpus: int) -> Order:
    if plan == "star":
        roaming = np.zeros(length, bool)
        if mask_name == "star":
            roaming[-(length // 8) :] = True
        return orders.two_class(roaming, gpus, align=min(8192, length // 8))
    # A window is balanced over consecutive tokens, and every other order would move more.
    return orders.build("contiguous" if mask_name == "window" else ORDERS.get(plan, "zigzag"), length, gpus)


def measure(
    case: Case, settings: Settings, rank: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Any]:
    """Times are of the slowest rank."""
    plan = plans.build(case.plan, case.order, case.mask, settings.heads, case.topology, settings.gradient_wire)  # type: ignore[arg-type]
    report = verify(plan, case.order, case.mask, head_dim=settings.head_dim)
    index, pairs = None, report.pairs * settings.heads[0]
    if settings.density is not None:
        index = drawn_index(settings.length, settings.heads[0], settings.density, settings.columns, device)
        pairs = int(index_work.work(index, case.order).sum())
    block = None if index is None else TILE
    prepared = prepare(plan, case.order, case.mask, rank, device, sparse_block=block, sparse_wire=settings.sparse_wire)
    generator = torch.Generator(device).manual_seed(rank)

    def draw(heads: int) -> Tensor:
        shape = (1, case.order.slots, heads, settings.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    q, k, v, dout = (draw(settings.heads[i]) for i in (0, 1, 1, 0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    given = None if case.gpus == 1 else group
    graph: list[Tensor] = []

    def forward() -> None:
        # An index of its own each time, as in training: what travels is not known from the run before.
        anew = None if index is None else replace(index)
        graph[:] = [attention(*inputs, prepared, given, index=anew, backend=settings.backend)[0]]

    def backward() -> None:
        torch.autograd.grad(graph[0], inputs, dout, retain_graph=True)

    row: dict[str, Any] = {"plan": case.plan, "mask": case.mask_name, "gpus": case.gpus, "order": case.order.name}
    row |= {"length": settings.length, "heads": settings.heads, "head_dim": settings.head_dim}
    row |= {"torch": torch.__version__, "backend": settings.backend, "gradient_wire": settings.gradient_wire}
    row |= {"imbalance": report.imbalance, "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for direction, run, products in (("forward", forward, 4), ("backward", backward, 10)):
        for _ in range(2):
            run()
        seconds = statistics.median(timed(run, group, device) for _ in range(_ROUNDS))
        idle = idle_share(run, group, device, case, direction, settings.trace)
        worst = torch.tensor([seconds, idle, -idle], dtype=torch.float64, device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
        seconds, idle, exposed = worst.tolist()
        flops = products * settings.head_dim * pairs
        if index is not None:
            row |= balance(run, group, device, direction)
        row |= {
            f"{direction}_ms": seconds * 1e3,
            f"{direction}_tflops": flops / seconds / case.gpus / 1e12,
            f"{direction}_exposed": -exposed,
            f"{direction}_idle": idle,
            f"{direction}_mb_sent": max(report.bytes_sent(direction, 2, 4)) / 1e6,  # type: ignore[arg-type]
        }
    if prepared.sieve is not None and index is not None:
        sent, whole = bytes_sent(prepared.sieve, index, settings.head_dim, 1, 2)
        row["sent"] = sent / whole
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def timed(run: Any, group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds of one run that all ranks of the group begin together."""
    _together(group, device)
    begin = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begin


def balance(run: Any, group: dist.ProcessGroup, device: torch.device, direction: str) -> dict[str, float]:
    """Imbalance of the kernels' times: of the ranks' sums, and of the stages in lockstep."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed_kernel(kernel: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            events[-1][0].record()
            results = kernel(*args, **options)
            events[-1][1].record()
            return results

        return call

    if device.type != "cuda":
        return {}
    kernels = {name: timed_kernel(getattr(execute, name)) for name in ("attend", "attend_backward")}
    with mock.patch.multiple(execute, **kernels):
        timed(run, group, device)
    mine = torch.tensor([begin.elapsed_time(end) for begin, end in events], device=device)
    times = mine.new_empty(group.size(), len(mine))
    dist.all_gather_into_tensor(times, mine, group=group)
    mean = times.sum() / len(times)
    names = (f"{direction}_worker", f"{direction}_lockstep")
    return dict(zip(names, (float(times.sum(1).max() / mean), float(times.amax(0).sum() / mean)), strict=True))


def idle_share(
    run: Any, group: dist.ProcessGroup, device: torch.device, case: Case, direction: str, trace: Path | None
) -> float:
    """Of one run on this rank the share in which no kernel but NCCL's is at work, from the profiler's events."""
    if device.type != "cuda":
        return float("nan")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = timed(run, group, device)
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        name = f"{case.mask_name}_{case.plan}_{case.gpus}_{direction}_rank{dist.get_rank()}.json"
        profiler.export_chrome_trace(str(trace / name))
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    computing = [(e.time_range.start, e.time_range.end) for e in events if "nccl" not in e.name.lower()]
    return 1 - covered(computing) * 1e-6 / seconds


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reach = 0.0, -float("inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reach))
        reach = max(reach, end)
    return total


def print_head(settings: Settings) -> None:
    query_heads, kv_heads = settings.heads
    print(
        f"{settings.length:,} tokens in all, {query_heads} heads over {kv_heads} x {settings.head_dim}, bf16, "
        f"{settings.backend}; partial gradients travel in {settings.gradient_wire}"
    )
    head = f"{'mask':<10} {'plan':<18}{'order':<12}{'GPUs':>5}"
    for direction in DIRECTIONS:
        head += f"{direction + ' ms':>13}{'TFLOP/s':>9}{'scaling':>9}{'exposed':>9}{'idle':>9}{'MB sent':>9}"
    print(head + f"{'GiB':>7}", flush=True)


def line(row: dict[str, Any]) -> str:
    line = f"{row['mask']:<10} {row['plan']:<18}{row['order']:<12}{row['gpus']:>5}"
    for d in DIRECTIONS:
        scaling = row.get(f"{d}_scaling")
        line += f"{row[f'{d}_ms']:>13.2f}{row[f'{d}_tflops']:>9.1f}"
        line += f"{'' if scaling is None else f'{scaling:.3f}':>9}{row[f'{d}_exposed']:>9.2%}{row[f'{d}_idle']:>9.2%}"
        line += f"{row[f'{d}_mb_sent']:>9.1f}"
        if f"{d}_worker" in row:
            line += f"  worker {row[f'{d}_worker']:.3f} lockstep {row[f'{d}_lockstep']:.3f}"
    if "sent" in row:
        line += f"  sent {row['sent']:.3f}"
    return line + f"{row.get('peak_gib', float('nan')):>7.1f}"


def _together(group: dist.ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    main()
