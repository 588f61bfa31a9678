"""What one rank needs to carry out a plan on one batch: slot masks, permutations, and its own moves by stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from farspan.kernels import IntervalMask, to_device
from farspan.kernels.index import Places
from farspan.parallel.orders import Order
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule
from farspan.parallel.sieve import Sieve


@dataclass(frozen=True, eq=False)
class Joined:
    """Some blocks as one tensor, in ascending position.

    `span` is set where they are one run of slots of this rank's own tensors, which need no joining. Otherwise
    `permutation` puts the concatenated blocks in ascending position; None where they already are.
    """

    blocks: tuple[int, ...]
    sizes: tuple[int, ...]
    span: Block | None
    permutation: Tensor | None

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        dim = slot_dim(tensors[0])
        joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
        return joined if self.permutation is None else joined.index_select(dim, self.permutation)

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`."""
        dim = slot_dim(joined)
        if self.permutation is not None:
            joined = torch.empty_like(joined).index_copy_(dim, self.permutation, joined)
        return joined.split(self.sizes, dim)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a frame: of the rank's own tensors (`frame.span`), or of blocks that are joined once for all pieces.

    `slots` are a run of the frame's, or else their numbers.
    """

    frame: Joined
    slots: slice | Tensor

    @property
    def count(self) -> int:
        return self.slots.stop - self.slots.start if isinstance(self.slots, slice) else len(self.slots)

    @property
    def all(self) -> bool:
        return self.slots == slice(0, sum(self.frame.sizes))

    def take(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """These rows of the frame's tensors; views of them where they are a run."""
        if isinstance(self.slots, slice):
            return tuple(x.narrow(slot_dim(x), self.slots.start, self.count) for x in tensors)
        return tuple(x.index_select(slot_dim(x), self.slots) for x in tensors)


@dataclass(frozen=True, eq=False)
class PreparedPiece:
    """`heads` are the query heads of its rows; `places` is None where no sparse index will be given."""

    q: Rows
    kv: Joined
    mask: IntervalMask
    heads: tuple[int, int]
    places: Places | None


@dataclass
class PreparedStage:
    """One rank's stage: what leaves, what is expected, what is computed, and which foreign blocks end here."""

    number: int
    sends: list[Move] = field(default_factory=list)
    receives: list[Move] = field(default_factory=list)
    pieces: list[PreparedPiece] = field(default_factory=list)
    last_uses: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class PreparedPlan:
    """A plan with the masks of one batch, for one rank; all layers of the batch share it."""

    plan: Plan
    rank: int
    forward: list[PreparedStage]
    backward: list[PreparedStage]
    sieve: Sieve | None = None
    """What sparse indexes leave out of the moves; None where all travels whatever is selected."""

    def sole_piece(self, stages: list[PreparedStage]) -> PreparedPiece | None:
        """The piece of a direction that is one call on all of this rank's own tensors: nothing adds up or moves."""
        pieces = [piece for stage in stages for piece in stage.pieces]
        if len(pieces) != 1 or any(stage.sends or stage.receives for stage in stages):
            return None
        q, kv = pieces[0].q, pieces[0].kv
        own = {index for index, block in enumerate(self.plan.blocks) if block.owner == self.rank}
        return pieces[0] if q.all and q.frame.span and kv.span and own == {*q.frame.blocks, *kv.blocks} else None


def prepare(
    plan: Plan,
    order: Order,
    mask: IntervalMask,
    rank: int,
    device: torch.device | str = "cpu",
    *,
    sparse_block: int | None = None,
    sparse_wire: bool = False,
) -> PreparedPlan:
    """`mask` is the batch's own, in positions; it may see less than the mask that the plan was made for, never more.

    With `sparse_block` the plan takes sparse indexes over blocks of so many tokens; ValueError if the order tears these
    apart. With `sparse_wire` only those keys and values travel that an index lets somebody read; ValueError for a plan
    in which queries travel.

    Pieces that see nothing are left out here. Their moves are not, for the other ranks expect them.
    """
    mine = [piece for piece in dict.fromkeys(plan.forward.pieces + plan.backward.pieces) if piece.rank == rank]
    frames = _frames(mine, plan, order, rank, device)
    pieces = {piece: _piece(piece, frames, plan, order, mask, rank, device, sparse_block) for piece in mine}
    forward = _stages(plan, plan.forward, rank, pieces, frames)
    kept = [block for holder, block in plan.kept if holder == rank]
    for stage in forward:
        stage.last_uses = [block for block in stage.last_uses if block not in kept]
    sieve = None
    if sparse_wire and sparse_block is not None and plan.world > 1:
        sieve = Sieve(plan, order, mask, rank, sparse_block, device)
    return PreparedPlan(plan, rank, forward, _stages(plan, plan.backward, rank, pieces, frames, kept), sieve)


def _frames(
    pieces: Sequence[Piece], plan: Plan, order: Order, rank: int, device: torch.device | str
) -> dict[int, Joined]:
    """For each block of rows the frame that it is in. Blocks that meet in a piece are in one frame.

    All blocks of a frame must be here when the first piece with one of them is computed, as they are in all our plans.
    """
    together: dict[int, set[int]] = {}
    for piece in pieces:
        met = set().union(*({block} | together.get(block, set()) for block in piece.q))
        together.update(dict.fromkeys(met, met))
    frames: dict[int, Joined] = {}
    for blocks in {id(met): sorted(met) for met in together.values()}.values():
        atoms = [plan.blocks[block] for block in blocks]
        if all(atom.owner == rank for atom in atoms):
            whole = Block("q", rank, (0, order.slots), atoms[0].heads)
            frame = Joined(tuple(blocks), (order.slots,), whole, None)
        else:
            frame = _joined(sorted(blocks, key=lambda block: _first(plan, order, block)), plan, order, rank, device)
        frames.update(dict.fromkeys(blocks, frame))
    return frames


def _piece(
    piece: Piece,
    frames: dict[int, Joined],
    plan: Plan,
    order: Order,
    mask: IntervalMask,
    rank: int,
    device: torch.device | str,
    sparse_block: int | None,
) -> PreparedPiece | None:
    frame = frames[piece.q[0]]
    if frame.span is not None:
        slots = np.sort(np.concatenate([np.arange(*plan.blocks[block].slots) for block in piece.q]))
        q_positions = order.positions[rank][slots]
    else:
        held, _ = _ascending(frame.blocks, plan, order)
        q_positions, _ = _ascending(piece.q, plan, order)
        slots = np.searchsorted(held, q_positions)
    keys = sorted(piece.kv, key=lambda block: _first(plan, order, block))
    k_positions, _ = _ascending(keys, plan, order)
    piece_mask = mask.at(q_positions, k_positions)
    if piece_mask.kind(len(k_positions)) == "empty":
        return None
    run = slots[-1] - slots[0] == len(slots) - 1
    at = slice(int(slots[0]), int(slots[-1]) + 1) if run else to_device(torch.from_numpy(slots), device)
    places = None if sparse_block is None else Places.of(q_positions, k_positions, sparse_block, device)
    joined, heads = _joined(keys, plan, order, rank, device), plan.blocks[piece.q[0]].heads
    return PreparedPiece(Rows(frame, at), joined, piece_mask.to(device), heads, places)


def _first(plan: Plan, order: Order, block: int) -> int:
    """Position of a block's first token."""
    atom = plan.blocks[block]
    return int(order.positions[atom.owner][atom.slots[0]])


def _ascending(blocks: Iterable[int], plan: Plan, order: Order) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions of the blocks together, ascending, and the permutation that makes them so (None: already are)."""
    positions = np.concatenate([plan.blocks[block].positions(order) for block in blocks])
    if (np.diff(positions) > 0).all():
        return positions, None
    permutation = np.argsort(positions, kind="stable")
    return positions[permutation], permutation


def _joined(blocks: Sequence[int], plan: Plan, order: Order, rank: int, device: torch.device | str) -> Joined:
    atoms = [plan.blocks[block] for block in blocks]
    sizes = tuple(atom.slots[1] - atom.slots[0] for atom in atoms)
    _, permutation = _ascending(blocks, plan, order)
    adjacent = all(a.slots[1] == b.slots[0] for a, b in pairwise(atoms))
    if permutation is None and adjacent and all(atom.owner == rank for atom in atoms):
        span = Block(atoms[0].side, rank, (atoms[0].slots[0], atoms[-1].slots[1]), atoms[0].heads)
        return Joined(tuple(blocks), sizes, span, None)
    return Joined(
        tuple(blocks), sizes, None, None if permutation is None else to_device(torch.from_numpy(permutation), device)
    )


def _stages(
    plan: Plan,
    schedule: Schedule,
    rank: int,
    pieces: dict[Piece, PreparedPiece | None],
    frames: dict[int, Joined],
    kept: Sequence[int] = (),
) -> list[PreparedStage]:
    stages = [PreparedStage(number) for number in range(schedule.stages)]
    last: dict[int, int] = dict.fromkeys(kept, 0)
    for move in schedule.moves:
        if move.src == rank:
            stages[move.start].sends.append(move)
        if move.dst == rank:
            stages[move.start].receives.append(move)
        if not move.home and rank in (move.src, move.dst):
            # An operand that nobody uses here is dropped at the stage in which it arrives.
            use = move.start if move.src == rank else move.stop
            last[move.block] = max(last.get(move.block, 0), use)
    for piece in schedule.pieces:
        if piece.rank == rank:
            for block in piece.q + piece.kv:
                last[block] = max(last.get(block, 0), piece.stage)
            prepared = pieces[piece]
            if prepared is not None:
                stages[piece.stage].pieces.append(prepared)
    for block in last:
        if plan.blocks[block].owner != rank:
            # All blocks of a frame are joined when the first is used, which in this batch may be late.
            together = frames[block].blocks if block in frames else (block,)
            stages[max(last.get(other, 0) for other in together)].last_uses.append(block)
    return stages


def slot_dim(x: Tensor) -> int:
    """Slots are dim 1 of `[B, slots, heads, D]` and dim 2 of `[B, heads, slots]`."""
    return 1 if x.dim() == 4 else 2
