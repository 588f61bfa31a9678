"""What of a plan's moves a sparse index leaves out: keys and values that nobody reads, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from farspan.kernels import IntervalMask, to_device
from farspan.kernels.index import Index
from farspan.kernels.row_blocks import RowBlocks
from farspan.kernels.transfer import HostCopy
from farspan.parallel.orders import Order
from farspan.parallel.plan import DIRECTIONS, Direction, Move, Plan, parts
from farspan.parallel.users import users

Lot = tuple[int, int]
"""A block of keys, and the ranks that want something of it, as bits."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """What travels of a block of keys: tiles of `size` slots, each of one kv head; int64 `[tiles]` on the device."""

    tile: Tensor
    head: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.tile)

    def take(self, x: Tensor) -> Tensor:
        """`[tiles, B, size, D]` of a block's `[B, slots, heads, D]`."""
        return x.unflatten(1, (-1, self.size))[:, self.tile, :, self.head]

    def put(self, whole: Tensor, taken: Tensor) -> None:
        """The inverse of `take`, into a block's tensor."""
        whole.unflatten(1, (-1, self.size))[:, self.tile, :, self.head] = taken


class Sieve:
    """Of a plan and the mask of a batch, for one rank; called with any layer's index.

    An operand travels for those who use it where it arrives or further on, a result for those who added to it: a tile
    of keys of one kv head goes along if the index lets any of these compute something of it. From the same index every
    rank derives the same of all others, so that none has to tell another what will come.
    """

    def __init__(
        self, plan: Plan, order: Order, mask: IntervalMask, rank: int, block: int, device: torch.device | str
    ) -> None:
        """`mask` in positions; `block` is the index's. ValueError for a plan in which queries travel."""
        self.plan, self.rank, self.block = plan, rank, block
        self.moves: dict[tuple[Direction, Move], int] = {}
        for direction in DIRECTIONS:
            moves = plan.schedule(direction).moves
            if any(plan.blocks[move.block].side == "q" for move in moves):
                raise ValueError(
                    f"plan {plan.name} sends queries, of which a sparse index leaves out nothing; set parallel.plan to "
                    "ring, hierarchical_ring or all_gather, or parallel.sparse_wire to false"
                )
            self.moves |= zip(((direction, move) for move in moves), users(plan, direction))
        held = [np.unique(positions[positions < order.length] // block) for positions in order.positions]
        self.rows = RowBlocks.of(held, mask, block, device)
        # Tiles of padding count as one block behind the last, which nobody reads.
        beyond = -(-order.length // block)
        self.blocks = [np.minimum(one.positions(order)[::block] // block, beyond) for one in plan.blocks]

        mine = {(move.block, who) for (_, move), who in self.moves.items() if rank in (move.src, move.dst)}
        used = {(block, 1 << rank) for piece in plan.forward.pieces if piece.rank == rank for block in piece.kv}
        self.lots = {lot: number for number, lot in enumerate(sorted(mine | used))}
        cells = [self._cells(number, lot) for lot, number in self.lots.items()]
        last = np.cumsum([cell.shape[1] for cell in cells]) - 1
        wanted = _bits((who for _, who in self.lots), plan.world).T.copy()
        self.cells = to_device(torch.from_numpy(np.concatenate(cells, 1)), device)
        self.wanted = to_device(torch.from_numpy(wanted), device)
        self.last = to_device(torch.from_numpy(last), device)  # cell of each lot
        self._found: WeakKeyDictionary[Index, Sifted] = WeakKeyDictionary()

    def __call__(self, index: Index) -> Sifted:
        """The same object for the same index, in both directions."""
        if index not in self._found:
            self._found[index] = Sifted(self, index)
        return self._found[index]

    @cached_property
    def carried(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Of each block of keys the lots that travel, of all ranks: who wants them, bool `[lots, world]`, and how many
        tensors carry each, in their own dtype and in that of sums, int64 `[lots, 2]`.
        """
        found: dict[int, dict[int, list[int]]] = {}
        for (direction, move), who in self.moves.items():
            tensors = found.setdefault(move.block, {}).setdefault(who, [0, 0])
            for part in parts(self.plan, move, direction == "backward"):
                tensors[part.accumulated] += 1
        return {block: (_bits(lots, self.plan.world), np.array([*lots.values()])) for block, lots in found.items()}

    def read(self, index: Index) -> Tensor:
        """Bool `[world, kv heads, blocks + 1]`: of which blocks of keys each rank reads something; none of the last."""
        read = index.reads(self.rows, self.plan.heads[1]).any(0).transpose(0, 1)
        return torch.nn.functional.pad(read, (0, 1))

    def _cells(self, number: int, lot: Lot) -> np.ndarray:
        """int64 `[5, tiles x heads]` of a lot: its number, and tile, head, the head's number in the plan and block."""
        (first, last), blocks = self.plan.blocks[lot[0]].heads, self.blocks[lot[0]]
        tile, head = (x.ravel() for x in np.indices((len(blocks), last - first)))
        return np.stack([np.full_like(tile, number), tile, head, head + first, blocks[tile]])


class Sifted:
    """What an index leaves of the moves of one rank.

    What was selected is known on the device alone, and lists of tiles are made there. But the host must know how much
    is sent and received, and so it is told the length of each list: some hundred numbers a layer, which are on their
    way as soon as the index is there, in the forward pass. The host waits for them when it first looks, which is once
    the work on the rank's own keys is launched, so that the device has something to do meanwhile.
    """

    def __init__(self, sieve: Sieve, index: Index) -> None:
        self.sieve = sieve
        lot, tile, head, of_plan, block = sieve.cells
        chosen = (sieve.read(index)[:, of_plan, block] & sieve.wanted[:, lot]).any(0)
        behind = chosen.cumsum(0)
        # What is not chosen goes to a place behind all lists.
        place = torch.where(chosen, behind - 1, len(chosen))
        self._tile, self._head = (x.new_empty(len(x) + 1).scatter_(0, place, x) for x in (tile, head))
        self._copy = HostCopy(behind[sieve.last])

    @cached_property
    def _stops(self) -> list[int]:
        """Where the list of each lot ends."""
        stops: list[int] = self._copy.read().tolist()
        return stops

    def tiles(self, direction: Direction, move: Move) -> Tiles:
        """Those of a move of this rank that travel."""
        return self._of((move.block, self.sieve.moves[direction, move]))

    def computes(self, blocks: tuple[int, ...]) -> bool:
        """Whether this rank computes anything of these blocks of keys."""
        return any(len(self._of((block, 1 << self.sieve.rank))) for block in blocks)

    def _of(self, lot: Lot) -> Tiles:
        number = self.sieve.lots[lot]
        here = slice(self._stops[number - 1] if number else 0, self._stops[number])
        return Tiles(self._tile[here], self._head[here], self.sieve.block)


def bytes_sent(
    sieve: Sieve, index: Index, head_dim: int, batch: int, itemsize: int, accumulation_itemsize: int = 4
) -> tuple[int, int]:
    """What all ranks together send for a layer, in both directions: with this index, and with none.

    Waits for the device.
    """
    read, blocks = sieve.read(index).cpu().numpy().astype(np.float32), sieve.plan.blocks
    sent = whole = 0
    for block, (wanted, tensors) in sieve.carried.items():
        of_block = read[:, slice(*blocks[block].heads)][:, :, sieve.blocks[block]].reshape(len(read), -1)
        tiles = (wanted.astype(np.float32) @ of_block > 0).sum(1)
        sizes = tensors @ np.array([itemsize, accumulation_itemsize])
        sent += int(tiles @ sizes) * sieve.block
        whole += int(sizes.sum()) * blocks[block].size
    return sent * batch * head_dim, whole * batch * head_dim


def _bits(sets: Iterable[int], world: int) -> np.ndarray:
    """Bool `[sets, world]` of sets of ranks."""
    packed = b"".join(who.to_bytes(-(-world // 8), "little") for who in sets)
    rows = np.frombuffer(packed, np.uint8).reshape(-1, -(-world // 8))
    return np.unpackbits(rows, axis=1, count=world, bitorder="little").astype(bool)
