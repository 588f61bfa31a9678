"""Carries out any plan: one loop for both directions, inside one autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import accumulation_dtype, attend, attend_backward, merge_into, row_delta
from farspan.parallel.plan import Block, Move, Side
from farspan.parallel.prepare import PreparedPiece, PreparedPlan, PreparedStage, Rows
from farspan.parallel.wire import Wire


class LayerMemory(Protocol):
    """Tensors, by name, kept from a layer's forward pass until it is computed again; what is taken is held no more."""

    def put(self, name: str, tensors: tuple[Tensor, ...]) -> None: ...

    def take(self, name: str) -> tuple[Tensor, ...] | None: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: PreparedPlan,
    group: dist.ProcessGroup | None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    memory: LayerMemory | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a packed row that the ranks of `group` share, differentiable in q, k and v.

    Args:
        q, k, v: this rank's slots, `[B, slots, H or Hkv, D]`; padding slots may hold anything.
        prepared: `prepare(plan, ...)` for this rank and batch.
        group: the context group; None when the plan is for one rank.
        memory: where the results are put, and taken from when the same call is made again to recompute its layer:
            then nothing is sent and no kernel runs.

    Returns:
        out `[B, slots, H, D]` in q's dtype and lse `[B, H, slots]`, which carries no gradient.
    """
    return _PlannedAttention.apply(q, k, v, _Call(prepared, group, scale, backend, memory))


class _Call(NamedTuple):
    prepared: PreparedPlan
    group: dist.ProcessGroup | None
    scale: float | None
    backend: str
    memory: LayerMemory | None

    def kept_blocks(self) -> list[int]:
        """Keys and values of others that the plan keeps here for the backward pass."""
        return sorted(block for holder, block in self.prepared.plan.kept if holder == self.prepared.rank)


class _PlannedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        results = call.memory.take("attention") if call.memory is not None else None
        if results is None:
            piece = call.prepared.sole_piece(call.prepared.forward)
            if piece is not None:
                results = attend(q, k, v, piece.mask, scale=call.scale, backend=call.backend)
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
            given = (dout, q, k, v, out, lse, piece.mask)
            return *attend_backward(*given, scale=call.scale, backend=call.backend), None
        run = _Backward(call, kept, out, (q, dout, lse, row_delta(dout, out)), (k, v))
        run()
        return run.dq.to(q.dtype), run.dk.to(k.dtype), run.dv.to(v.dtype), None


class _Run:
    """The loop. `_Forward` and `_Backward` say what an operand is, what a piece computes and how results add up."""

    direction: str
    stages: list[PreparedStage]

    def __init__(
        self,
        call: _Call,
        operands: dict[Side, tuple[Tensor, ...]],
        totals: dict[Side, tuple[Tensor, ...]],
        arrived: dict[int, tuple[Tensor, ...]],
    ) -> None:
        self.plan, self.rank = call.prepared.plan, call.prepared.rank
        self.scale, self.backend = call.scale, call.backend
        self.operands, self.totals = operands, totals
        self.foreign = dict(arrived)
        self.results: dict[int, tuple[Tensor, ...]] = {}
        self.wire = Wire(self.plan, self.rank, call.group, operands["kv"][0], backward=self.direction == "backward")

    def __call__(self) -> None:
        for stage in self.stages:
            for move, tensors in self.wire.receive(stage.number):
                if move.home:
                    self.add(move.block, tensors)
                else:
                    self.foreign[move.block] = tensors
            self.wire.send([(move, self.payload(move)) for move in stage.sends], stage.receives)
            for piece in stage.pieces:
                self.compute(piece)
            for block in stage.last_uses:
                del self.foreign[block]

    def payload(self, move: Move) -> tuple[Tensor, ...]:
        return self.results.pop(move.block) if move.home else self.operand(move.block)

    def operand(self, index: int) -> tuple[Tensor, ...]:
        """A block's operand tensors: views of our own, or what has arrived."""
        block = self.plan.blocks[index]
        return self.foreign[index] if block.owner != self.rank else _views(self.operands[block.side], block)

    def gather(self, rows: Rows) -> tuple[Tensor, ...]:
        """The operand tensors of some blocks, each as one tensor in ascending position."""
        if rows.span is not None:
            return _views(self.operands[rows.span.side], rows.span)
        return tuple(rows.join(tensors) for tensors in zip(*map(self.operand, rows.blocks)))

    def accumulators(self, rows: Rows) -> tuple[Tensor, ...] | None:
        """Where a kernel may add the result of these rows in place, if that is one place."""
        return None if rows.span is None else _views(self.totals[rows.span.side], rows.span)

    def scatter(self, rows: Rows, results: tuple[Tensor, ...]) -> None:
        for block, tensors in zip(rows.blocks, zip(*map(rows.split, results))):
            self.add(block, tensors)

    def add(self, index: int, tensors: tuple[Tensor, ...]) -> None:
        """Adds a result to a block's total: in our own tensors, or to what will travel home."""
        block = self.plan.blocks[index]
        if block.owner == self.rank:
            self.combine(_views(self.totals[block.side], block), tensors)
        elif index in self.results:
            self.combine(self.results[index], tensors)
        else:
            self.results[index] = tensors

    def compute(self, piece: PreparedPiece) -> None:
        raise NotImplementedError

    def combine(self, total: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        raise NotImplementedError


class _Forward(_Run):
    direction = "forward"

    def __init__(self, call: _Call, q: Tensor, k: Tensor, v: Tensor) -> None:
        work = accumulation_dtype(q.dtype)
        self.stages = call.prepared.forward
        self.out = torch.zeros_like(q, dtype=work)
        self.lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=work)
        super().__init__(call, {"q": (q,), "kv": (k, v)}, {"q": (self.out, self.lse)}, {})

    def kept(self) -> list[Tensor]:
        """Keys and values of `kept_blocks`, one after another; all other operands of others are gone by now."""
        return [x for block in sorted(self.foreign) for x in self.foreign[block]]

    def compute(self, piece: PreparedPiece) -> None:
        (q,), (k, v) = self.gather(piece.q), self.gather(piece.kv)
        total = self.accumulators(piece.q)
        result = attend(
            q,
            k,
            v,
            piece.mask,
            scale=self.scale,
            backend=self.backend,
            out_dtype=self.out.dtype,
            accumulate=None if total is None else (total[0], total[1]),
        )
        if total is None:
            self.scatter(piece.q, result)

    def combine(self, total: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        merge_into(*total, *tensors)


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
        work = accumulation_dtype(rows[0].dtype)
        self.stages = call.prepared.backward
        self.out = out
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=work) for x in (rows[0], *keys))
        arrived: dict[int, tuple[Tensor, ...]] = {}
        for block, k, v in zip(call.kept_blocks(), kept[::2], kept[1::2], strict=True):
            arrived[block] = (k, v)
        super().__init__(call, {"q": rows, "kv": keys}, {"q": (self.dq,), "kv": (self.dk, self.dv)}, arrived)

    def compute(self, piece: PreparedPiece) -> None:
        (q, dout, lse, delta), (k, v) = self.gather(piece.q), self.gather(piece.kv)
        to_q, to_kv = self.accumulators(piece.q), self.accumulators(piece.kv)
        # Rows that travel bring delta instead of out.
        out = None if piece.q.span is None else _views((self.out,), piece.q.span)[0]
        gradients = attend_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            piece.mask,
            scale=self.scale,
            backend=self.backend,
            delta=delta,
            out_dtype=self.dq.dtype,
            accumulate=(to_q[0] if to_q else None, *((to_kv[0], to_kv[1]) if to_kv else (None, None))),
        )
        if to_q is None:
            self.scatter(piece.q, gradients[:1])
        if to_kv is None:
            self.scatter(piece.kv, gradients[1:])

    def combine(self, total: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        for sum_, tensor in zip(total, tensors):
            sum_ += tensor


def _views(tensors: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    """A block's part of a rank's own tensors, `[B, slots, heads, D]` or `[B, heads, slots]`."""
    slots, heads = slice(*block.slots), slice(*block.heads)
    return tuple(x[:, slots, heads] if x.dim() == 4 else x[:, heads, slots] for x in tensors)
