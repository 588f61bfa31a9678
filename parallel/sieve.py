"""What of a plan's moves a sparse index leaves out: keys and values that nobody reads, and their gradients."""

from __future__ import annotations

from collections import defaultdict
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
        moves = {(d, move): users for d in DIRECTIONS for move, users in zip(plan.schedule(d).moves, _users(plan, d))}
        if any(plan.blocks[move.block].side == "q" for _, move in moves):
            raise ValueError(
                f"plan {plan.name} sends queries, which attention.sparse cannot thin out; set parallel.plan to ring, "
                "hierarchical_ring or all_gather, or parallel.sparse_wire to false"
            )
        self.plan, self.rank, self.block, self.device = plan, rank, block, device
        self.moves: dict[tuple[Direction, Move], int] = moves
        held = [np.unique(positions[positions < order.length] // block) for positions in order.positions]
        self.rows = RowBlocks.of(held, mask, block, device)
        # Tiles of padding lie behind the last block of positions, which nobody reads.
        beyond = -(-order.length // block)
        self.tiles = [np.minimum(one.positions(order)[::block] // block, beyond) for one in plan.blocks]
        self._found: WeakKeyDictionary[Index, Sifted] = WeakKeyDictionary()

    def __call__(self, index: Index) -> Sifted:
        """The same object for the same index, in both directions."""
        if index not in self._found:
            self._found[index] = Sifted(self, index)
        return self._found[index]


class Sifted:
    """What an index leaves of each move.

    The host must know how much a rank sends and receives, and only the device knows what was selected. So one bitmap of
    ranks x kv heads x blocks of keys (a quarter of a megabyte for 512K tokens, 32 ranks and 2 kv heads) is copied a
    layer, in the forward pass, as soon as the index is there. The host waits for it when it is first looked at, which
    is once the work on the rank's own keys is launched: the device has that to do meanwhile.
    """

    def __init__(self, sieve: Sieve, index: Index) -> None:
        self.sieve = sieve
        read = index.reads(sieve.rows, sieve.plan.heads[1]).any(0).transpose(0, 1)
        self._copy = HostCopy(torch.nn.functional.pad(read, (0, 1)))
        self._lists: dict[tuple[int, int], Tiles] = {}

    @cached_property
    def read(self) -> np.ndarray:
        """Bool `[world, kv heads, blocks + 1]`: what each rank reads; nobody reads the last block, which is padding."""
        return self._copy.read().numpy()

    def computes(self, blocks: tuple[int, ...]) -> bool:
        """Whether this rank computes anything of these blocks of keys."""
        return any(self._chosen(block, 1 << self.sieve.rank).any() for block in blocks)

    def tiles(self, direction: Direction, move: Move) -> Tiles:
        """Those of a move of this rank."""
        if not self._lists:
            self._lists = self._on_device()
        return self._lists[move.block, self.sieve.moves[direction, move]]

    def bytes(self, head_dim: int, batch: int, itemsize: int, accumulation_itemsize: int = 4) -> tuple[int, int]:
        """What all ranks together send, in both directions: with this index, and with none."""
        sieve, sent, whole = self.sieve, 0, 0
        counts: dict[tuple[int, int], int] = {}
        for (direction, move), users in sieve.moves.items():
            key = move.block, users
            if key not in counts:
                counts[key] = int(self._chosen(*key).sum())
            for part in parts(sieve.plan, move, direction == "backward"):
                element = batch * head_dim * (accumulation_itemsize if part.accumulated else itemsize)
                sent += counts[key] * sieve.block * element
                whole += part.rows * part.heads * element
        return sent, whole

    def _chosen(self, block: int, users: int) -> np.ndarray:
        """Bool `[kv heads of the block, tiles]`: what any of these ranks reads."""
        first, last = self.sieve.plan.blocks[block].heads
        ranks = [rank for rank in range(self.sieve.plan.world) if users >> rank & 1]
        chosen: np.ndarray = self.read[ranks, first:last][:, :, self.sieve.tiles[block]].any(0)
        return chosen

    def _on_device(self) -> dict[tuple[int, int], Tiles]:
        """The lists of all moves of this rank, by block and users, in one copy."""
        sieve = self.sieve
        mine = {(m.block, users) for (_, m), users in sieve.moves.items() if sieve.rank in (m.src, m.dst)}
        found = {key: np.nonzero(self._chosen(*key)) for key in sorted(mine)}
        sizes = [len(head) for head, _ in found.values()]
        heads, tiles = (np.concatenate([pair[side] for pair in found.values()]) for side in (0, 1))
        both = to_device(torch.from_numpy(np.stack([tiles, heads])), sieve.device).split(sizes, 1)
        return {key: Tiles(*lists, sieve.block) for key, lists in zip(found, both)}


def _users(plan: Plan, direction: Direction) -> list[int]:
    """For each move the ranks for whom it travels, as bits: who uses the operand, or has added to the result."""
    schedule = plan.schedule(direction)
    moves, pieces = schedule.moves, schedule.pieces
    found = [0] * len(moves)
    at: dict[tuple[int, int], int] = defaultdict(int)  # by rank and block, who uses the block there or further on
    for piece in pieces:
        for block in piece.kv:
            at[piece.rank, block] |= 1 << piece.rank
    operands = [number for number, move in enumerate(moves) if not move.home]
    for number in sorted(operands, key=lambda number: -moves[number].start):
        move = moves[number]
        found[number] = at[move.dst, move.block]
        at[move.src, move.block] |= found[number]

    added: dict[tuple[int, int], int] = defaultdict(int)  # by rank and block, whose results are in the sum there
    arriving, leaving = ([[] for _ in range(schedule.stages)] for _ in range(2))
    computed: list[list[tuple[int, int]]] = [[] for _ in range(schedule.stages)]
    for number, move in enumerate(moves):
        if move.home:
            leaving[move.start].append(number)
            arriving[move.stop].append(number)
    for piece in pieces:
        computed[piece.stage] += [(piece.rank, block) for block in piece.kv]
    for stage in range(schedule.stages):
        for number in arriving[stage]:
            added[moves[number].dst, moves[number].block] |= found[number]
        for number in leaving[stage]:
            found[number] = added.pop((moves[number].src, moves[number].block), 0)
        for rank, block in computed[stage]:
            added[rank, block] |= 1 << rank
    return found
