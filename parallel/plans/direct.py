"""Direct sends: keys and values, or queries, go straight from their owners to the ranks that use them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule
from farspan.parallel.plans.need import Wanted, need, wanted
from farspan.parallel.plans.tree import halving


def all_gather(order: Order, mask: IntervalMask, heads: tuple[int, int]) -> Plan:
    """Every rank receives all keys and values of the ranks that its rows need, a quarter of the kv heads at a time.

    One slice of heads travels while the slice before it is computed, so that a rank holds the whole row for two slices
    and not for all heads (the head stride of Llama 3's context parallelism, arXiv:2407.21783). Ranks compute their own
    keys while the first slice is on its way. Gradients go straight home.
    """
    readers = [sorted({rank for run in runs for rank in run.ranks}) for runs in wanted(order, mask, order.positions)]
    runs = [[Wanted((0, order.slots), tuple(ranks))] for ranks in readers]
    return _Build("all_gather", order, mask, heads, runs, slices=4).plan()


def group_cast(order: Order, mask: IntervalMask, heads: tuple[int, int]) -> Plan:
    """Every rank receives exactly the keys and values that its rows see: for windows and packed documents.

    All at once, beside the work on its own keys; gradients go straight home (MagiAttention's group cast and reduce,
    SandAI 2025, made of sends between pairs).
    """
    return _Build("group_cast", order, mask, heads, wanted(order, mask, order.positions)).plan()


def star(order: Order, mask: IntervalMask, heads: tuple[int, int]) -> Plan:
    """Star Attention (arXiv:2411.17116) as training needs it: anchors are sent once, and global rows travel.

    Phase 1, for the rows that stay: what several ranks need, the anchor, goes out from its owner as a broadcast down a
    tree, on which its gradients come back as sums. Phase 2, for `order.roaming` rows (query and response tokens): their
    queries go to every rank that holds keys which they see, and partial results merge at home; keys, and their
    gradients, stay where they are.
    """
    stay = [positions[~order.roams(rank)] for rank, positions in enumerate(order.positions)]
    return _Build("star", order, mask, heads, wanted(order, mask, stay), star=True).plan()


class _Build:
    """`runs` are the slots of each owner with the ranks that they are sent to."""

    def __init__(
        self,
        name: str,
        order: Order,
        mask: IntervalMask,
        heads: tuple[int, int],
        runs: list[list[Wanted]],
        *,
        slices: int = 1,
        star: bool = False,
    ) -> None:
        self.name, self.order, self.mask, self.heads, self.runs = name, order, mask, heads, runs
        self.slices, self.star = min(slices, heads[1]), star
        self.blocks: list[Block] = []
        self.pieces: list[Piece] = []
        self.moves: list[Move] = []  # operands, and what comes of rows that travel: the same in both directions
        self.home: list[Move] = []  # gradients of keys and values

    def plan(self) -> Plan:
        query_heads, kv_heads = self.heads
        group = query_heads // kv_heads
        edges = [i * kv_heads // self.slices for i in range(self.slices + 1)]
        for stage, (low, high) in enumerate(pairwise(edges)):
            self.slice_of_heads(stage, (low * group, high * group), (low, high))
        pieces = tuple(self.pieces)
        return Plan(
            self.name,
            self.order.world,
            self.heads,
            tuple(self.blocks),
            Schedule(tuple(self.moves), pieces),
            Schedule(tuple(self.moves + self.home), pieces),
        )

    def slice_of_heads(self, stage: int, query_heads: tuple[int, int], kv_heads: tuple[int, int]) -> None:
        ranks = range(self.order.world)
        staying, roaming = ([self._rows(rank, roams, query_heads) for rank in ranks] for roams in (False, True))
        keys = [[self._add("kv", rank, run.slots, kv_heads) for run in self.runs[rank]] for rank in ranks]
        rows, columns = _flat(staying + roaming), _flat(keys)
        seen = need(self.order, self.mask, [self.blocks[i] for i in rows], [self.blocks[i] for i in columns])
        sees = {row: {columns[at] for at in np.flatnonzero(line).tolist()} for row, line in zip(rows, seen)}

        def compute(rank: int, stage: int, rows: Iterable[int], held: Iterable[int]) -> tuple[int, ...]:
            """Adds the piece of what is visible, if anything is; its rows."""
            here = set(held)
            seeing = tuple(row for row in rows if sees[row] & here)
            if seeing:
                used = here.intersection(block for row in seeing for block in sees[row])
                self.pieces.append(Piece(rank, stage, seeing, tuple(sorted(used))))
            return seeing

        received: list[list[int]] = [[] for _ in ranks]
        arrival = [stage] * self.order.world
        trees = []
        for owner, (owned, runs) in enumerate(zip(keys, self.runs)):
            for block, run in zip(owned, runs):
                tree = halving([owner, *run.ranks]) if self.star else [(owner, rank, 0) for rank in run.ranks]
                trees.append((block, tree))
                for source, rank, depth in tree:
                    self.moves.append(Move(block, source, rank, stage + depth, stage + depth + 1))
                    arrival[rank] = max(arrival[rank], stage + depth + 1)
                    received[rank].append(block)
        for rank in ranks:
            compute(rank, stage, staying[rank], keys[rank])
            compute(rank, arrival[rank], staying[rank], received[rank])
            for block in compute(rank, stage + 1, _flat(roaming), keys[rank]):
                owner = self.blocks[block].owner
                if owner != rank:
                    self.moves.append(Move(block, owner, rank, stage, stage + 1))
                    self.moves.append(Move(block, rank, owner, stage + 2, stage + 3, home=True))
        for block, tree in trees:
            self._bring_home(block, tree, arrival)

    def _bring_home(self, block: int, tree: list[tuple[int, int, int]], computed: list[int]) -> None:
        """Gradients go back the way the block came: a rank waits for those behind it, and sends one sum."""
        ready: dict[int, int] = {}
        for parent, rank, _ in reversed(tree):
            start = max(computed[rank] + 1, ready.get(rank, 0))
            self.home.append(Move(block, rank, parent, start, start + 1, home=True))
            ready[parent] = max(ready.get(parent, 0), start + 1)

    def _rows(self, rank: int, roams: bool, heads: tuple[int, int]) -> list[int]:
        """Blocks of the rank's rows that roam, or of those that stay: a block a run of slots."""
        chosen = np.concatenate([[False], (self.star & self.order.roams(rank)) == roams, [False]])
        edges = np.flatnonzero(chosen[1:] != chosen[:-1]).tolist()
        return [self._add("q", rank, span, heads) for span in zip(edges[::2], edges[1::2])]

    def _add(self, side: str, rank: int, slots: tuple[int, int], heads: tuple[int, int]) -> int:
        self.blocks.append(Block(side, rank, slots, heads))  # type: ignore[arg-type]
        return len(self.blocks) - 1


def _flat(blocks: list[list[int]]) -> list[int]:
    return [block for of_rank in blocks for block in of_rank]
