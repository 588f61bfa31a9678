"""One rank's part of a plan, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from farspan.kernels import IntervalMask
from farspan.kernels.index import Index
from farspan.parallel import orders
from farspan.parallel.execute import Groups, attention
from farspan.parallel.plan import Plan
from farspan.parallel.prepare import prepare
from farspan.parallel.wire import Wire


def run_plan(
    rank: int,
    plan: Plan,
    order: orders.Order,
    mask: IntervalMask,
    whole: tuple[torch.Tensor, ...],
    group: Groups = None,
    backend: str = "auto",
    index: Index | None = None,
    sparse_wire: bool = False,
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """out, lse, dq, dk, dv of this rank's slots, and the bytes that it sent. Padding slots hold garbage.

    `rank` is the place in `group`, which is all ranks when not given; `whole` are q, k, v and dout of the whole row.
    """
    q, k, v, dout = (order.shard(x, rank, padding=7.0) for x in whole)
    local = [x.requires_grad_() for x in (q, k, v)]
    sent = {"forward": 0, "backward": 0}
    send = Wire.send

    def counting(wire: Wire, *arguments: Any) -> None:
        before = wire.bytes_sent
        send(wire, *arguments)
        sent["backward" if wire.backward else "forward"] += wire.bytes_sent - before

    Wire.send = counting  # type: ignore[method-assign]
    try:
        block = None if index is None else index.block
        prepared = prepare(plan, order, mask, rank, sparse_block=block, sparse_wire=sparse_wire)
        out, lse = attention(*local, prepared, group or dist.group.WORLD, index=index, backend=backend)
        out.backward(dout)
    finally:
        Wire.send = send  # type: ignore[method-assign]
    return [out.detach(), lse, *(x.grad for x in local)], sent
