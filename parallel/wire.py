"""Sending and receiving the moves of a plan over torch.distributed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import accumulation_dtype
from farspan.parallel.plan import Direction, Move, Plan, parts
from farspan.parallel.sieve import Sifted, Tiles
from farspan.parallel.streams import SideStream
from farspan.parallel.transfers import Transfer

Layout = list[tuple[torch.Size, torch.dtype]]
"""Shape and dtype of each tensor of a move."""
Item = TypeVar("Item")
Key = TypeVar("Key")


class Deadline(NamedTuple):
    """Transfers that start together, on one link and until one stage, are one batch; results go after operands."""

    home: bool
    link: str
    stop: int


class Wire:
    """Moves of one direction of one plan, for one rank.

    What goes to one peer with one deadline is one message, keys and values together. Receives are posted with the sends
    of their first stage and waited for at their last, so a transfer runs beside the pieces in between. Packing and
    waiting happen on a stream of their own: operands go on before the kernels that were launched earlier are done, and
    only results wait for these. The buffer of operands that were used for the last time is taken again, once the
    kernels that read it are done, and that of what was sent: a ring has two to compute with and to fill, one to send.

    With `sifted` only tiles travel that somebody needs. They are put in their places in a tensor of the whole block,
    which is zero elsewhere: the kernels see no difference.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        groups: Mapping[str, dist.ProcessGroup] | None,
        like: Tensor,
        backward: bool,
        sifted: Sifted | None = None,
    ) -> None:
        if plan.world > 1 and groups is None:
            raise ValueError(f"a plan for {plan.world} ranks needs the process group of these ranks")
        self.plan, self.rank, self.groups, self.backward = plan, rank, groups or {}, backward
        self.direction: Direction = "backward" if backward else "forward"
        self.sifted = sifted
        self.batch, self.head_dim, self.device = like.shape[0], like.shape[3], like.device
        self.dtypes = {False: like.dtype, True: accumulation_dtype(like.dtype)}
        self.bytes_sent = 0
        self._stream = SideStream(like.device)
        self._stream.follow()  # the rank's own tensors are being made
        self._arriving: dict[int, list[tuple[list[Move], Tensor]]] = defaultdict(list)
        self._transfers: dict[int, list[Transfer]] = defaultdict(list)
        self._sent: dict[int, list[Tensor]] = defaultdict(list)
        self._payloads: list[Tensor] = []
        self._holder: dict[int, Tensor] = {}  # of each foreign operand here, the buffer
        self._free: dict[int, list[tuple[Tensor, torch.cuda.Event | None]]] = defaultdict(list)

    def send(self, stage: int, outgoing: list[tuple[Move, tuple[Tensor, ...]]], incoming: list[Move]) -> None:
        """Posts all transfers that start at this stage; returns at once."""
        sends = _grouped(outgoing, lambda item: _deadline(item[0]))
        receives = _grouped(incoming, _deadline)
        with self._stream.active():
            for deadline in sorted({*sends, *receives}):
                if deadline.home:
                    self._stream.follow()
                group = self.groups[deadline.link]
                operations = []
                for peer, bundle in _grouped(sends.get(deadline, []), lambda item: item[0].dst).items():
                    pieces = [piece for move, tensors in bundle for piece in self._packed(move, tensors)]
                    if not sum(map(len, pieces)):
                        continue
                    message = torch.cat(pieces, out=self._buffer(sum(map(len, pieces))))
                    self.bytes_sent += message.numel()
                    self._sent[deadline.stop].append(message)
                    operations.append(dist.P2POp(dist.isend, message, dist.get_global_rank(group, peer), group))
                for peer, moves in _grouped(receives.get(deadline, []), lambda move: move.src).items():
                    message = self._buffer(sum(self._size(self._travelling(move)) for move in moves))
                    self._arriving[deadline.stop].append((moves, message))
                    if len(message):
                        operations.append(dist.P2POp(dist.irecv, message, dist.get_global_rank(group, peer), group))
                if operations:
                    transfer = Transfer(self.plan.name, self.direction, stage, deadline.stop)
                    transfer.post(operations)
                    self._transfers[deadline.stop].append(transfer)
        # What was given may not be overwritten before the stream has read it.
        self._payloads += [x for _, tensors in outgoing for x in tensors]

    def receive(self, stage: int) -> Iterator[tuple[Move, tuple[Tensor, ...]]]:
        """Everything whose deadline is this stage, in the plan's order; kernels launched from now on may read it."""
        transfers = self._transfers.pop(stage, [])
        arrived = self._arriving.pop(stage, [])
        if transfers or arrived or self._payloads:
            with self._stream.active():
                for transfer in transfers:
                    transfer.wait()
                arrived = [(moves, self._whole(moves, message)) for moves, message in arrived]
            self._stream.lead()
        self._payloads.clear()
        for message in self._sent.pop(stage, []):  # the stream has waited for it
            self._free[message.numel()].append((message, None))
        for moves, message in arrived:
            # Operands come back through `release`; a result is dropped when its addition is launched, not done.
            if moves[0].home:
                self._stream.lend(message)
            for move, tensors in zip(moves, _views(message, map(self._layout, moves))):
                if not move.home:
                    self._holder[move.block] = message
                yield move, tensors

    def release(self, blocks: Sequence[int]) -> None:
        """The operands of these blocks were used for the last time, by kernels that are launched."""
        for block in blocks:
            buffer = self._holder.pop(block, None)
            if buffer is not None and all(other is not buffer for other in self._holder.values()):
                self._free[buffer.numel()].append((buffer, self._stream.mark()))

    def finish(self) -> None:
        """All transfers are over for whatever is launched from now on."""
        self._stream.lead()

    def _buffer(self, size: int) -> Tensor:
        if self._free[size]:
            buffer, read = self._free[size].pop(0)
            self._stream.after(read)
            return buffer
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _packed(self, move: Move, tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
        tiles = self._tiles(move)
        for tensor, (shape, dtype) in zip(tensors, self._layout(move), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{move} carries {tuple(shape)}, got {tuple(tensor.shape)}")
            # Not view(-1): it leaves a single element the stride that it had, and bytes need a stride of 1.
            if tiles is not None:
                tensor = tiles.take(tensor)
            yield tensor.to(dtype).contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)

    def _whole(self, moves: list[Move], message: Tensor) -> Tensor:
        """What arrived as a message of whole blocks."""
        if all(self._tiles(move) is None for move in moves):
            return message
        whole = self._buffer(sum(self._size(self._layout(move)) for move in moves)).zero_()
        places, taken = _views(whole, map(self._layout, moves)), _views(message, map(self._travelling, moves))
        for move, targets, sources in zip(moves, places, taken):
            tiles = self._tiles(move)
            for target, source in zip(targets, sources):
                if tiles is None:
                    target.copy_(source)
                else:
                    tiles.put(target, source)
        self._free[message.numel()].append((message, None))
        return whole

    def _tiles(self, move: Move) -> Tiles | None:
        """Those of a move that travel; None where all do."""
        if self.sifted is None:
            return None
        tiles, block = self.sifted.tiles(self.direction, move), self.plan.blocks[move.block]
        return None if len(tiles) * tiles.size == block.size else tiles

    def _travelling(self, move: Move) -> Layout:
        """As `_layout`, of what travels."""
        tiles = self._tiles(move)
        if tiles is None:
            return self._layout(move)
        return [
            (torch.Size((len(tiles), self.batch, tiles.size, self.head_dim)), dtype) for _, dtype in self._layout(move)
        ]

    def _layout(self, move: Move) -> Layout:
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
    def _size(layout: Layout) -> int:
        return sum(shape.numel() * dtype.itemsize for shape, dtype in layout)


def _views(message: Tensor, layouts: Iterable[Layout]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each move in a message."""
    at = 0
    for layout in layouts:
        tensors = []
        for shape, dtype in layout:
            size = shape.numel() * dtype.itemsize
            tensors.append(message[at : at + size].view(dtype).view(shape))
            at += size
        yield tuple(tensors)


def _deadline(move: Move) -> Deadline:
    return Deadline(move.home, move.link, move.stop)


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items with the same key, in the plan's order, which is the same on both sides."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
