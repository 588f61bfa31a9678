"""A plan is data: who sends what to whom, and who computes what, stage by stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from farspan.parallel.columns import MoveColumns, PieceColumns
from farspan.parallel.orders import Order

Side = Literal["q", "kv"]
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
LINKS = ("direct", "exchange", "inner", "outer")


class PlanError(ValueError):
    """A plan that would not compute the attention it was made for."""


@dataclass(frozen=True)
class Block:
    """Some slots x some heads of one rank's rows ("q") or of its keys and values ("kv"): what travels and is computed.

    The blocks of one side of a rank partition its slots x heads. `slots` and `heads` are half-open; heads are query
    heads for "q" and kv heads for "kv".
    """

    side: Side
    owner: int
    slots: tuple[int, int]
    heads: tuple[int, int]

    @property
    def size(self) -> int:
        """Slots times heads."""
        return (self.slots[1] - self.slots[0]) * (self.heads[1] - self.heads[0])

    def positions(self, order: Order) -> np.ndarray:
        return order.positions[self.owner][slice(*self.slots)]


# A thousand ranks make millions of moves and pieces. To freeze them makes each five times as expensive.
@dataclass(slots=True, unsafe_hash=True)
class Move:
    """A block on its way: it leaves `src` as stage `start` begins and is at `dst` as stage `stop` begins.

    An operand stays at its source as well. With `home`, what moves is the result accumulated at the source so far (out
    and lse, or dq; dk and dv), which the source then forgets and the destination adds to its own. `link` names the
    communicator, one of `LINKS`: direct sends, exchanges of heads, hops of an inner ring, hops from node to node.
    """

    block: int
    src: int
    dst: int
    start: int
    stop: int
    home: bool = False
    link: str = "direct"


@dataclass(slots=True, unsafe_hash=True)
class Piece:
    """One call of `attend` on one rank at one stage: rows x keys, each some blocks, taken in ascending position."""

    rank: int
    stage: int
    q: tuple[int, ...]
    kv: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """All moves and pieces of one direction, of all ranks; a rank takes the ones that name it."""

    moves: tuple[Move, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def move_columns(self) -> MoveColumns:
        return MoveColumns.of(self.moves)

    @cached_property
    def piece_columns(self) -> PieceColumns:
        return PieceColumns.of(self.pieces)

    @cached_property
    def stages(self) -> int:
        """Number of stages; the last one may have arrivals only."""
        return 1 + int(max(self.move_columns.stop.max(initial=-1), self.piece_columns.stage.max(initial=-1)))


@dataclass(frozen=True)
class Plan:
    """How the attention of one packed row is computed by `world` ranks.

    `heads` is (query heads, kv heads) of what a context rank holds; moves and pieces name blocks by their index.
    `kept` holds (rank, block): operands that stay where the forward pass brought them, for the backward pass.
    `gradient_wire` is the dtype in which partial gradients travel; their sums are fp32 all the same.
    """

    name: str
    world: int
    heads: tuple[int, int]
    blocks: tuple[Block, ...]
    forward: Schedule
    backward: Schedule
    kept: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    gradient_wire: Literal["fp32", "bf16"] = "fp32"

    def schedule(self, direction: Direction) -> Schedule:
        return self.forward if direction == "forward" else self.backward

    @cached_property
    def complete(self) -> frozenset[int]:
        """Blocks whose result one rank alone computes, so that it may travel in the tensor's own dtype.

        All other results travel in the accumulation dtype. Blocks partition the tokens x heads, so the judgement by
        block is one by token and head.
        """
        pieces = self.backward.piece_columns
        used = np.zeros((len(self.blocks), self.world), bool)
        for uses in (pieces.q, pieces.kv):
            used[uses.blocks, pieces.rank[uses.pieces]] = True
        return frozenset(np.flatnonzero(used.sum(1) == 1).tolist())

    def digest(self) -> str:
        """The same on every rank, or the ranks do not carry out the same plan."""
        content = hashlib.sha256(
            repr((self.name, self.world, self.heads, self.blocks, sorted(self.kept), self.gradient_wire)).encode()
        )
        for schedule in (self.forward, self.backward):
            *moves, links = schedule.move_columns
            rank, stage, q, kv = schedule.piece_columns
            content.update(repr((len(schedule.moves), len(schedule.pieces), links)).encode())
            for column in (*moves, rank, stage, *q, *kv):
                content.update(column.tobytes())
        return content.hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """One tensor in a move: `rows` x `heads` x (head dim, or 1), in the tensor's own or in the accumulation dtype."""

    rows: int
    heads: int
    wide: bool
    accumulated: bool


def parts(plan: Plan, move: Move, backward: bool) -> list[Part]:
    """What a move carries. The executor's buffers and `verify`'s bytes are both read off here.

    Operands: keys and values; queries forward; queries, dout, lse and delta backward. Results: out and lse, dq, or dk
    and dv.
    """
    block = plan.blocks[move.block]
    rows, heads = block.slots[1] - block.slots[0], block.heads[1] - block.heads[0]
    own, row = Part(rows, heads, True, False), Part(rows, heads, False, True)
    if not move.home:
        if block.side == "kv":
            return [own, own]
        return [own, own, row, row] if backward else [own]
    narrow = move.block in plan.complete or (backward and plan.gradient_wire == "bf16")
    result = Part(rows, heads, True, not narrow)
    if block.side == "kv":
        return [result, result]
    return [result] if backward else [result, row]
