"""What the executor asks of kernels, known before a tensor exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from farspan.kernels.problem import Problem
from farspan.parallel.prepare import PreparedPiece, PreparedPlan


def problems(prepared: PreparedPlan, tensors: Problem, backward: bool) -> Iterator[tuple[PreparedPiece, Problem]]:
    """The pieces of one direction, each with the problem that `attend` or `attend_backward` will be given.

    Of `tensors` the batch, head dims, dtype and GPU count; the rest is the plan's.
    """
    blocks = prepared.plan.blocks
    stages = prepared.backward if backward else prepared.forward
    sole = prepared.sole_piece(stages)
    uses = Counter(piece.q.frame for stage in stages for piece in stage.pieces)
    for piece in (piece for stage in stages for piece in stage.pieces):
        frame = piece.q.frame
        several = frame.span is not None or uses[frame] > 1 or not piece.q.all
        in_place = (several and isinstance(piece.q.slots, slice)) or (backward and piece.kv.span is not None)
        (first, last), (kv_first, kv_last) = (blocks[of.blocks[0]].heads for of in (frame, piece.kv))
        yield (
            piece,
            replace(
                tensors,
                keys=sum(piece.kv.sizes),
                heads=last - first,
                kv_heads=kv_last - kv_first,
                backward=backward,
                accumulate=in_place and piece is not sole,
                # Rows that travel bring delta instead of out.
                out_given=not backward or frame.span is not None,
            ),
        )
