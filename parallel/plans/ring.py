"""Rings: rows stay, keys and values go round; and Ulysses, whose ranks first exchange tokens for heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule
from farspan.parallel.plans.heads import Share, shares
from farspan.parallel.plans.need import need

Hop = tuple[int, int]
"""How far a chunk of keys has come: outer hops, then inner hops in that node."""


def ring(
    order: Order,
    mask: IntervalMask,
    heads: tuple[int, int],
    *,
    name: str = "ring",
    inner: int | None = None,
    ulysses: int = 1,
) -> Plan:
    """Ranks are outer x inner x ulysses, neighbours first in `ulysses`; without `inner` there is one ring.

    **Ring** (Ring Attention, arXiv:2310.01889). At stage s rank r computes its rows against the keys of rank r - s,
    which then move on to rank r + 1. Backward the keys go the same way; their gradients follow one stage behind, so
    that a rank adds what arrives to what it has computed meanwhile, and the last hop brings them home. A block goes no
    further than the last rank whose rows need it, and one that nobody else needs does not leave. On zigzag orders the
    two chunks of a rank are blocks of their own, so a piece is the exact rectangle that the algorithm is known for.

    **Hierarchical ring** (the double ring of LoongTrain, arXiv:2406.18485). The keys that a rank begins a round of its
    node with go to its peer in the next node meanwhile: one slow hop hides behind `inner` fast ones.

    **Ulysses** (DeepSpeed-Ulysses, arXiv:2309.14509). The `ulysses` ranks of a group first send each other their
    tokens for some of the heads: each is then a rank of a ring, with all tokens of its group and its share of the
    heads. A kv head that several shares read goes to each of them, and its gradients add up at its owner. Heads are
    exchanged in waves, one while the wave before it is computed. Nothing exchanged is kept for the backward pass, which
    exchanges again: it costs little beside what the group computes.
    """
    build = _Build(order, mask, heads, inner or order.world // ulysses, ulysses)
    for share in shares(heads, ulysses):
        for chunk in range(build.groups):
            build.rotate(chunk, share)
        build.exchange_rows(share)
    pieces = tuple(build.pieces)
    forward, backward = tuple(build.forward), tuple(build.forward + build.home)
    outputs = tuple(build.outputs)
    return Plan(
        name,
        order.world,
        heads,
        tuple(build.blocks),
        Schedule(forward + outputs, pieces),
        Schedule(backward + outputs, pieces),
    )


class _Build:
    """Chunk g is the tokens of group g, whose ranks are g x ulysses and those behind it."""

    def __init__(self, order: Order, mask: IntervalMask, heads: tuple[int, int], inner: int, ulysses: int) -> None:
        self.inner, self.ulysses = inner, ulysses
        self.groups = order.world // ulysses
        self.blocks: list[Block] = []
        self.pieces: list[Piece] = []
        self.forward: list[Move] = []  # operands, which go the same way in both directions
        self.home: list[Move] = []  # gradients of keys and values
        self.outputs: list[Move] = []  # results of rows that were exchanged, in both directions
        self.last_use: dict[tuple[int, int], int] = {}  # (rank, block of rows): the stage of its last piece
        # A group's spans in ascending position, so that joining long runs needs no permutation.
        self.spans = [
            sorted(
                ((rank, span) for rank in range(g * ulysses, (g + 1) * ulysses) for span in order.spans(rank)),
                key=lambda span: order.positions[span[0]][span[1][0]],
            )
            for g in range(self.groups)
        ]
        self.index: dict[tuple[str, int, tuple[int, int]], list[int]] = {}
        flat = [Block("q", rank, span, (0, 1)) for spans in self.spans for rank, span in spans]
        needed = need(order, mask, flat, flat)
        starts = np.cumsum([0] + [len(spans) for spans in self.spans[:-1]])
        # [group][other group][span]: the group's spans of rows that need keys of the other; of keys, that it needs.
        rows, keys = np.logical_or.reduceat(needed, starts, 1), np.logical_or.reduceat(needed, starts, 0).T
        self.rows = [part.T.tolist() for part in np.split(rows, starts[1:])]
        self.keys = [part.T.tolist() for part in np.split(keys, starts[1:])]

    def rotate(self, chunk: int, share: Share) -> None:
        """The keys of a chunk go round for one share of the heads."""
        kv_blocks = self._blocks("kv", chunk, share.keys)
        used: dict[int, list[Hop]] = {block: [] for block in kv_blocks}
        for number in range(self.groups):
            hop = divmod(number, self.inner)
            holder = self._holder(chunk, hop)
            rows = _chosen(self._blocks("q", holder, share.queries), self.rows[holder][chunk])
            if not rows:
                continue
            keys, rank, stage = (
                _chosen(kv_blocks, self.keys[chunk][holder]),
                self._rank(holder, share),
                self._stage(share, hop),
            )
            self.pieces.append(Piece(rank, stage, rows, keys))
            for block in keys:
                used[block].append(hop)
            for block in rows:
                self.last_use[rank, block] = max(stage, self.last_use.get((rank, block), 0))
        for block, hops in used.items():
            if hops:
                self._journey(block, chunk, share, hops)

    def _journey(self, block: int, chunk: int, share: Share, used: list[Hop]) -> None:
        """A block of keys goes as far as it is used, and its gradients come back."""

        def at(outer: int, inner: int) -> int:
            return self._rank(self._holder(chunk, (outer, inner)), share)

        owner, root = self.blocks[block].owner, at(0, 0)
        if owner != root:
            self.forward.append(Move(block, owner, root, share.wave, share.wave + 1, link="exchange"))
        complete = 0  # when all gradients are at the root
        behind: tuple[int, int] | None = None  # where the sum over the nodes so far is, and from which stage on
        for outer in range(used[-1][0] + 1):
            inner_uses = [inner for node, inner in used if node == outer]
            entry, stage = at(outer, 0), self._stage(share, (outer, 0))
            if outer:
                self.forward.append(Move(block, at(outer - 1, 0), entry, stage - self.inner, stage, link="outer"))
            last = max(inner_uses, default=0)
            for inner in range(1, last + 1):
                here, arrival = at(outer, inner), stage + inner
                self.forward.append(Move(block, at(outer, inner - 1), here, arrival - 1, arrival, link="inner"))
                if any(0 < use <= inner for use in inner_uses):
                    after = at(outer, inner + 1) if inner < last else entry
                    self.home.append(Move(block, here, after, arrival + 1, arrival + 2, True, "inner"))
            ready = stage + (last + 2 if last else 1)
            if outer == 0:
                complete = ready
            elif behind is not None:
                rank, start = behind
                behind = entry, max(ready, start + 1)
                self.home.append(Move(block, rank, entry, start, behind[1], True, "outer"))
            elif inner_uses:
                behind = entry, ready
        if behind is not None:
            rank, start = behind
            self.home.append(Move(block, rank, root, start, start + 1, True, "outer"))
            complete = max(complete, start + 1)
        if owner != root:
            self.home.append(Move(block, root, owner, complete, complete + 1, True, "exchange"))

    def exchange_rows(self, share: Share) -> None:
        """Rows come for one share of the heads before its first stage, and their results go home after its last."""
        for group in range(self.groups):
            rank = self._rank(group, share)
            for block in self._blocks("q", group, share.queries):
                owner, last = self.blocks[block].owner, self.last_use.get((rank, block))
                if owner != rank and last is not None:
                    self.forward.append(Move(block, owner, rank, share.wave, share.wave + 1, link="exchange"))
                    self.outputs.append(Move(block, rank, owner, last + 1, last + 2, True, "exchange"))

    def _blocks(self, side: str, group: int, heads: tuple[int, int]) -> list[int]:
        """Indices of one group's blocks, a block a span; a kv head that several shares read has one block."""
        key = side, group, heads
        if key not in self.index:
            first = len(self.blocks)
            self.blocks += [Block(side, rank, span, heads) for rank, span in self.spans[group]]  # type: ignore[arg-type]
            self.index[key] = list(range(first, len(self.blocks)))
        return self.index[key]

    def _holder(self, chunk: int, hop: Hop) -> int:
        """The group that has a chunk of keys after so many hops."""
        node, place = divmod(chunk, self.inner)
        outer = self.groups // self.inner
        return (node + hop[0]) % outer * self.inner + (place + hop[1]) % self.inner

    def _stage(self, share: Share, hop: Hop) -> int:
        exchange = 1 if self.ulysses > 1 else 0
        return share.wave + exchange + hop[0] * self.inner + hop[1]

    def _rank(self, group: int, share: Share) -> int:
        return group * self.ulysses + share.place


def _chosen(blocks: Sequence[int], choice: Sequence[bool]) -> tuple[int, ...]:
    return tuple(block for block, wanted in zip(blocks, choice) if wanted)
