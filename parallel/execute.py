"""Carries out any plan: one loop for both directions, inside one autograd function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import accumulation_dtype, attend, attend_backward, merge_into, row_delta
from farspan.kernels.index import Index, Selection
from farspan.parallel.plan import LINKS, Block, Move, Side
from farspan.parallel.prepare import Joined, PreparedPiece, PreparedPlan, PreparedStage, Rows, slot_dim
from farspan.parallel.sieve import Sifted
from farspan.parallel.wire import Wire

Groups = dist.ProcessGroup | Mapping[str, dist.ProcessGroup] | None
"""The context group, or a group for each of `LINKS`, all of the same ranks; None when a plan is for one rank."""


class LayerMemory(Protocol):
    """Tensors, by name, kept from a layer's forward pass until it is computed again; what is taken is held no more."""

    def put(self, name: str, tensors: tuple[Tensor, ...]) -> None: ...

    def take(self, name: str) -> tuple[Tensor, ...] | None: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: PreparedPlan,
    group: Groups,
    *,
    index: Index | None = None,
    scale: float | None = None,
    backend: str = "auto",
    memory: LayerMemory | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a packed row that the ranks of `group` share, differentiable in q, k and v.

    Args:
        q, k, v: this rank's slots, `[B, slots, H or Hkv, D]`; padding slots may hold anything.
        prepared: `prepare(plan, ...)` for this rank and batch.
        index: what is computed of that which the mask shows, for all query heads that this rank has before the plan
            moves any; the same on all ranks, and for both directions. The plan must be prepared with its block.
        group: of the ranks that share the row. Transfers on one of several do not wait for those on another.
        memory: where the results are put, and taken from when the same call is made again to recompute its layer:
            then nothing is sent and no kernel runs.

    Returns:
        out `[B, slots, H, D]` in q's dtype and lse `[B, H, slots]`, which carries no gradient.
    """
    groups = group if isinstance(group, Mapping) or group is None else dict.fromkeys(LINKS, group)
    return _PlannedAttention.apply(q, k, v, _Call(prepared, groups, index, scale, backend, memory))


@dataclass(frozen=True, eq=False)
class _Call:
    prepared: PreparedPlan
    groups: Mapping[str, dist.ProcessGroup] | None
    index: Index | None
    scale: float | None
    backend: str
    memory: LayerMemory | None

    def kept_blocks(self) -> list[int]:
        """Keys and values of others that the plan keeps here for the backward pass."""
        return sorted(block for holder, block in self.prepared.plan.kept if holder == self.prepared.rank)

    def options(self, piece: PreparedPiece) -> dict[str, Any]:
        """What a kernel is told of a piece beside its tensors and mask."""
        return {"index": self.selection(piece), "scale": self.scale, "backend": self.backend}

    def sifted(self) -> Sifted | None:
        """What travels and is computed, as far as the host is to know; None where all does."""
        sieve = self.prepared.sieve
        return None if sieve is None or self.index is None else sieve(self.index)

    def selection(self, piece: PreparedPiece) -> Selection | None:
        """The index's part of a piece; its lists are made anew for each direction, from the same index."""
        if self.index is None:
            return None
        if piece.places is None:
            raise ValueError("a sparse index was given for a plan that was prepared without `sparse_block`")
        return self.index.at(piece.places, piece.heads)


class _PlannedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        results = call.memory.take("attention") if call.memory is not None else None
        if results is None:
            piece = call.prepared.sole_piece(call.prepared.forward)
            if piece is not None:
                results = attend(q, k, v, piece.mask, **call.options(piece))
            else:
                run = _Forward(call, q, k, v)
                run()
                results = (run.out.to(q.dtype), run.lse, *run.kept())
            if call.memory is not None:
                # Detached: what is returned below refers to the graph, and the graph to the memory.
                call.memory.put("attention", tuple(x.detach() for x in results))
        out, lse, *kept = results
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *kept = ctx.saved_tensors
        call: _Call = ctx.call
        piece = call.prepared.sole_piece(call.prepared.backward)
        if piece is not None:
            return *attend_backward(dout, q, k, v, out, lse, piece.mask, **call.options(piece)), None
        run = _Backward(call, kept, out, (q, dout, lse, row_delta(dout, out)), (k, v))
        run()
        return run.dq.to(q.dtype), run.dk.to(k.dtype), run.dv.to(v.dtype), None


class _Run(ABC):
    """The loop. `_Forward` and `_Backward` say what an operand is, what a piece computes and how results add up."""

    direction: str
    stages: list[PreparedStage]
    dtype: torch.dtype  # of results

    def __init__(
        self,
        call: _Call,
        operands: dict[Side, tuple[Tensor, ...]],
        totals: dict[Side, tuple[Tensor, ...]],
        arrived: dict[int, tuple[Tensor, ...]],
    ) -> None:
        self.plan, self.rank = call.prepared.plan, call.prepared.rank
        self.options = call.options
        self.operands, self.totals = operands, totals
        self.foreign = dict(arrived)
        self.results: dict[int, tuple[Tensor, ...]] = {}
        self.frames: dict[Joined, _Frame] = {}
        self.uses = Counter(piece.q.frame for stage in self.stages for piece in stage.pieces)
        self.sifted = call.sifted()
        backward = self.direction == "backward"
        self.wire = Wire(self.plan, self.rank, call.groups, operands["kv"][0], backward, self.sifted)

    def __call__(self) -> None:
        for stage in self.stages:
            for move, tensors in self.wire.receive(stage.number):
                if move.home:
                    self.add(move.block, tensors)
                else:
                    self.foreign[move.block] = tensors
            # No result leaves at stage 0: its work may come first, and the device has it while the host waits to hear
            # what travels.
            first = self.sifted is not None and stage.number == 0
            if first:
                self.work(stage)
            self.wire.send(stage.number, [(move, self.payload(move)) for move in stage.sends], stage.receives)
            if not first:
                self.work(stage)
            for block in stage.last_uses:
                del self.foreign[block]
            self.wire.release(stage.last_uses)
        for frame in list(self.frames.values()):
            self.close(frame)
        self.wire.finish()

    def work(self, stage: PreparedStage) -> None:
        """All pieces of a stage, but for those of which the host knows that nothing is selected.

        It does not ask at stage 0, where a rank has its own keys alone, some of which are always selected.
        """
        for piece in stage.pieces:
            if self.sifted is None or stage.number == 0 or self.sifted.computes(piece.kv.blocks):
                self.compute(piece)

    def payload(self, move: Move) -> tuple[Tensor, ...]:
        if not move.home:
            return self.operand(move.block)
        for frame in list(self.frames.values()):
            if move.block in frame.joined.blocks:
                self.close(frame)
        block = self.plan.blocks[move.block]
        return self.results.pop(move.block) if move.block in self.results else self.blank(block)

    def operand(self, index: int) -> tuple[Tensor, ...]:
        """A block's operand tensors: views of our own, or what has arrived."""
        block = self.plan.blocks[index]
        return self.foreign[index] if block.owner != self.rank else _views(self.operands[block.side], block)

    def keys(self, joined: Joined) -> tuple[Tensor, ...]:
        if joined.span is not None:
            return _views(self.operands["kv"], joined.span)
        return tuple(joined.join(tensors) for tensors in zip(*map(self.operand, joined.blocks)))

    def frame(self, rows: Rows) -> _Frame:
        joined = rows.frame
        if joined not in self.frames:
            if joined.span is not None:
                return _Frame(joined, _views(self.operands["q"], joined.span), _views(self.totals["q"], joined.span))
            operands = tuple(joined.join(tensors) for tensors in zip(*map(self.operand, joined.blocks)))
            sole = self.uses[joined] == 1 and rows.all
            self.frames[joined] = _Frame(joined, operands, None if sole else self.nothing(operands))
        return self.frames[joined]

    def close(self, frame: _Frame) -> None:
        """Hands out a frame's results to its blocks."""
        del self.frames[frame.joined]
        assert frame.totals is not None
        for block, tensors in zip(frame.joined.blocks, zip(*map(frame.joined.split, frame.totals))):
            self.add(block, tensors)

    def add(self, index: int, tensors: tuple[Tensor, ...]) -> None:
        """Adds a result to a block's total: in our own tensors, or to what will travel home."""
        block = self.plan.blocks[index]
        if block.owner == self.rank:
            self.combine(_views(self.totals[block.side], block), tensors)
        elif index in self.results:
            self.combine(self.results[index], tensors)
        else:
            # What travelled narrow may be added to here.
            self.results[index] = tuple(x.to(self.dtype) for x in tensors)

    def blank(self, block: Block) -> tuple[Tensor, ...]:
        """The result of a block of which this batch sees nothing here; the plan sends it home all the same."""
        slots, heads = block.slots[1] - block.slots[0], block.heads[1] - block.heads[0]
        return tuple(
            x.new_zeros(x.shape[0], slots, heads, x.shape[3])
            if x.dim() == 4
            else x.new_full((x.shape[0], heads, slots), float("-inf"))
            for x in self.totals[block.side]
        )

    def put(self, frame: _Frame, rows: Rows, result: tuple[Tensor, ...]) -> None:
        """Adds what a kernel could not add in place."""
        if frame.totals is None:
            frame.totals = result
            return
        assert isinstance(rows.slots, Tensor), "what is a run was added in place"
        total = rows.take(frame.totals)
        self.combine(total, result)
        for whole, part in zip(frame.totals, total):
            whole.index_copy_(slot_dim(whole), rows.slots, part)

    @abstractmethod
    def compute(self, piece: PreparedPiece) -> None:
        """Calls the kernel, and adds what it could not add in place."""

    @abstractmethod
    def combine(self, total: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        """Adds a result to a total in place."""

    @abstractmethod
    def nothing(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The total of rows for which nothing was computed yet."""


@dataclass(eq=False)
class _Frame:
    """Rows as one tensor, and what was computed of them so far; None until the one result that there will be."""

    joined: Joined
    operands: tuple[Tensor, ...]
    totals: tuple[Tensor, ...] | None

    def accumulators(self, rows: Rows) -> tuple[Tensor, ...] | None:
        """Where a kernel may add the result of these rows in place, if that is one place."""
        return rows.take(self.totals) if self.totals is not None and isinstance(rows.slots, slice) else None


class _Forward(_Run):
    direction = "forward"

    def __init__(self, call: _Call, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.stages = call.prepared.forward
        self.dtype = accumulation_dtype(q.dtype)
        self.out, self.lse = self.nothing((q,))
        super().__init__(call, {"q": (q,), "kv": (k, v)}, {"q": (self.out, self.lse)}, {})

    def kept(self) -> list[Tensor]:
        """Keys and values of `kept_blocks`, one after another; all other operands of others are gone by now."""
        return [x for block in sorted(self.foreign) for x in self.foreign[block]]

    def compute(self, piece: PreparedPiece) -> None:
        frame = self.frame(piece.q)
        (q,), (k, v) = piece.q.take(frame.operands), self.keys(piece.kv)
        total = frame.accumulators(piece.q)
        result = attend(
            q,
            k,
            v,
            piece.mask,
            **self.options(piece),
            out_dtype=self.dtype,
            accumulate=None if total is None else (total[0], total[1]),
        )
        if total is None:
            self.put(frame, piece.q, result)

    def combine(self, total: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        merge_into(*total, *tensors)

    def nothing(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q = operands[0]
        out = torch.zeros_like(q, dtype=self.dtype, memory_format=torch.contiguous_format)
        return out, q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=self.dtype)


class _Backward(_Run):
    direction = "backward"

    def __init__(
        self,
        call: _Call,
        kept: list[Tensor],
        out: Tensor,
        rows: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
    ) -> None:
        self.dtype = accumulation_dtype(rows[0].dtype)
        self.stages = call.prepared.backward
        self.out = out
        self.dq, self.dk, self.dv = (self.nothing((x,))[0] for x in (rows[0], *keys))
        arrived: dict[int, tuple[Tensor, ...]] = {}
        for block, k, v in zip(call.kept_blocks(), kept[::2], kept[1::2], strict=True):
            arrived[block] = (k, v)
        super().__init__(call, {"q": rows, "kv": keys}, {"q": (self.dq,), "kv": (self.dk, self.dv)}, arrived)

    def compute(self, piece: PreparedPiece) -> None:
        frame = self.frame(piece.q)
        (q, dout, lse, delta), (k, v) = piece.q.take(frame.operands), self.keys(piece.kv)
        to_q = frame.accumulators(piece.q)
        to_kv = None if piece.kv.span is None else _views(self.totals["kv"], piece.kv.span)
        # Rows that travel bring delta instead of out.
        span = frame.joined.span
        out = None if span is None else piece.q.take(_views((self.out,), span))[0]
        gradients = attend_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            piece.mask,
            **self.options(piece),
            delta=delta,
            out_dtype=self.dtype,
            accumulate=(to_q[0] if to_q else None, *((to_kv[0], to_kv[1]) if to_kv else (None, None))),
        )
        if to_q is None:
            self.put(frame, piece.q, gradients[:1])
        if to_kv is None:
            for block, tensors in zip(piece.kv.blocks, zip(*map(piece.kv.split, gradients[1:]))):
                self.add(block, tensors)

    def combine(self, total: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        for sum_, tensor in zip(total, tensors):
            sum_ += tensor

    def nothing(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(operands[0], dtype=self.dtype, memory_format=torch.contiguous_format),)


def _views(tensors: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    """A block's part of a rank's own tensors, `[B, slots, heads, D]` or `[B, heads, slots]`."""
    slots, heads = slice(*block.slots), slice(*block.heads)
    return tuple(x[:, slots, heads] if x.dim() == 4 else x[:, heads, slots] for x in tensors)
