"""Sending and receiving the moves of a plan over torch.distributed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import accumulation_dtype
from farspan.parallel.plan import Move, Plan, parts

Item = TypeVar("Item")


class Wire:
    """Moves of one direction of one plan, for one rank.

    What goes to one peer with one deadline is one message. Receives are posted with the sends of their first stage and
    waited for at their last, so a transfer runs beside the pieces in between, on the communicator's own stream.
    Receiving buffers are new ones, which makes two in flight at once: one being computed with, one being filled.
    """

    def __init__(self, plan: Plan, rank: int, group: dist.ProcessGroup | None, like: Tensor, backward: bool) -> None:
        if plan.world > 1 and group is None:
            raise ValueError(f"a plan for {plan.world} ranks needs the process group of these ranks")
        self.plan, self.rank, self.group, self.backward = plan, rank, group, backward
        self.batch, self.head_dim, self.device = like.shape[0], like.shape[3], like.device
        self.dtypes = {False: like.dtype, True: accumulation_dtype(like.dtype)}
        self.bytes_sent = 0
        self._arriving: dict[int, list[tuple[list[Move], Tensor]]] = defaultdict(list)
        self._works: dict[int, list[dist.Work]] = defaultdict(list)
        self._sent: dict[int, list[Tensor]] = defaultdict(list)

    def send(self, outgoing: list[tuple[Move, tuple[Tensor, ...]]], incoming: list[Move]) -> None:
        """Posts all transfers that start at one stage; returns at once."""
        operations: dict[int, list[dist.P2POp]] = defaultdict(list)
        for (peer, stop), bundle in _bundles(outgoing, lambda item: (item[0].dst, item[0].stop)).items():
            message = torch.cat([piece for move, tensors in bundle for piece in self._packed(move, tensors)])
            self.bytes_sent += message.numel()
            self._sent[stop].append(message)
            operations[stop].append(dist.P2POp(dist.isend, message, self._global(peer), self.group))
        for (peer, stop), moves in _bundles(incoming, lambda move: (move.src, move.stop)).items():
            size = sum(self._bytes(shape, dtype) for move in moves for shape, dtype in self._layout(move))
            message = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._arriving[stop].append((moves, message))
            operations[stop].append(dist.P2POp(dist.irecv, message, self._global(peer), self.group))
        for stop in sorted(operations):
            self._works[stop] += dist.batch_isend_irecv(operations[stop])

    def receive(self, stage: int) -> Iterator[tuple[Move, tuple[Tensor, ...]]]:
        """Everything whose deadline is this stage, in the plan's order; waits until it is here."""
        for work in self._works.pop(stage, []):
            work.wait()
        self._sent.pop(stage, None)
        for moves, message in self._arriving.pop(stage, []):
            at = 0
            for move in moves:
                tensors = []
                for shape, dtype in self._layout(move):
                    size = self._bytes(shape, dtype)
                    tensors.append(message[at : at + size].view(dtype).view(shape))
                    at += size
                yield move, tuple(tensors)

    def _packed(self, move: Move, tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
        for tensor, (shape, dtype) in zip(tensors, self._layout(move), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{move} carries {tuple(shape)}, got {tuple(tensor.shape)}")
            yield tensor.to(dtype).reshape(-1).view(torch.uint8)

    def _layout(self, move: Move) -> list[tuple[torch.Size, torch.dtype]]:
        return [
            (
                torch.Size(
                    (self.batch, part.rows, part.heads, self.head_dim)
                    if part.wide
                    else (self.batch, part.heads, part.rows)
                ),
                self.dtypes[part.accumulated],
            )
            for part in parts(self.plan, move, self.backward)
        ]

    @staticmethod
    def _bytes(shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize

    def _global(self, peer: int) -> int:
        """Plans count ranks within the context group; torch.distributed addresses peers by their global rank."""
        assert self.group is not None
        return dist.get_global_rank(self.group, peer)


def _bundles(items: Iterable[Item], key: Callable[[Item], tuple[int, int]]) -> dict[tuple[int, int], list[Item]]:
    """Items with the same (peer, deadline), in the plan's order on both sides, become one message."""
    bundles: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for item in items:
        bundles[key(item)].append(item)
    return bundles
