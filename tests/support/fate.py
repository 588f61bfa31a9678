"""Ranks of which one dies or hangs in the middle of a plan; the others say what became of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.oracle import random_qkv

from farspan.kernels import masks
from farspan.parallel import orders, plans, transfers
from farspan.parallel.execute import attention
from farspan.parallel.prepare import prepare
from farspan.parallel.transfers import Transfer, TransferError
from farspan.parallel.wire import Wire

VICTIM = 1


@dataclass(frozen=True)
class Fate:
    """Where `VICTIM` meets its end, and by what: SIGKILL, or SIGSTOP, with which nothing is closed."""

    plan: str
    backward: bool
    stage: int
    by: signal.Signals
    world: int = 4
    timeout: float = 60.0
    watched: bool = False
    """On a CPU, watched as on a GPU; all are late after a twentieth of the timeout."""
    cuda: bool = False
    """Over NCCL, on a GPU each."""


@dataclass(frozen=True)
class End:
    """Of a rank beside the victim: its exit code, seconds until then, its error if it could raise one, its stderr."""

    code: int | None
    seconds: float
    error: str
    stderr: str


def ends(fate: Fate, folder: Path) -> dict[int, End]:
    """By rank; the victim is not among them."""
    # Processes that are forked from one that has imported torch already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "farspan.parallel.execute"])
    processes: list[Any] = [
        context.Process(target=_live, args=(rank, fate, folder), daemon=True) for rank in range(fate.world)
    ]
    for process in processes:
        process.start()
    while not (folder / "met").exists():
        assert processes[VICTIM].is_alive(), "the victim ended too early"
        time.sleep(0.01)
    begin, found = time.monotonic(), {}
    others = [rank for rank in range(fate.world) if rank != VICTIM]
    while len(found) < len(others) and time.monotonic() < begin + 60:
        for rank in others:
            if rank not in found and processes[rank].exitcode is not None:
                words = [(folder / f"{rank}.{kind}").read_text() for kind in ("error", "stderr")]
                found[rank] = End(processes[rank].exitcode, time.monotonic() - begin, *words)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return found


def _live(rank: int, fate: Fate, folder: Path) -> None:
    torch.set_num_threads(1)
    report = folder / f"{rank}.error"
    report.touch()
    os.dup2(os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT), 2)
    if rank == VICTIM:
        _doom(fate, folder / "met")
    elif fate.watched:
        _watch_as_on_a_gpu()
    if fate.cuda:
        torch.cuda.set_device(rank)
        os.environ["NCCL_NVLS_ENABLE"] = "0"
    device = torch.device("cuda", rank) if fate.cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if fate.cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=fate.world,
        timeout=timedelta(seconds=fate.timeout),
    )
    dist.all_reduce(torch.zeros(1, device=device))
    try:
        length, heads = 64, (4, 2)
        order, mask = orders.zigzag(length, fate.world), masks.causal(length)
        q, k, v, dout = (order.shard(x, rank).to(device) for x in random_qkv(length, heads, 4))
        operands = [x.requires_grad_() for x in (q, k, v)]
        plan = plans.build(fate.plan, order, mask, heads)
        out, _ = attention(*operands, prepare(plan, order, mask, rank, device), dist.group.WORLD)
        out.backward(dout)
        for operand in operands:
            assert operand.grad is not None
            operand.grad.cpu()  # on a GPU the host waits here, and nothing can be raised
    except TransferError as error:
        report.write_text(str(error))
    os._exit(0)  # as a rank that ends at once: a neighbour sees the connection closed


def _doom(fate: Fate, met: Path) -> None:
    send = Wire.send

    def doomed(wire: Wire, stage: int, *rest: Any) -> None:
        if (wire.backward, stage) == (fate.backward, fate.stage):
            met.touch()
            os.kill(os.getpid(), fate.by)
        send(wire, stage, *rest)

    Wire.send = doomed  # type: ignore[method-assign]


def _watch_as_on_a_gpu() -> None:
    post = Transfer.post

    def watched(transfer: Transfer, operations: list[dist.P2POp]) -> None:
        transfers._watch(torch.device("cpu")).add(transfer)
        post(transfer, operations)

    Transfer.post = watched  # type: ignore[method-assign]
    Transfer.failed = lambda _: False  # type: ignore[method-assign]
    transfers._PATIENCE = 0.05
