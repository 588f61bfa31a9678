"""Which backends compute the pieces of a plan, in a few lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch

from farspan.kernels.choice import choose, in_words
from farspan.kernels.problem import Problem
from farspan.kernels.tiles import TILE, TileMap
from farspan.parallel.prepare import PreparedPiece, PreparedPlan
from farspan.parallel.problems import problems
from farspan.trainer.config import ConfigError, RunConfig


def attention_problem(config: RunConfig, capability: tuple[int, int] | None) -> Problem:
    """One rank's own rows as attention sees them; `capability` is the GPU's, None on a CPU."""
    train, model = config.train, config.model
    heads, kv_heads = model.heads_of_rank(config.parallel.tensor)
    return Problem(
        batch=train.micro_batch_rows,
        keys=train.sequence_length // config.parallel.context,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=model.head_dim,
        value_dim=model.head_dim,
        dtype=torch.bfloat16 if train.dtype == "bf16" else torch.float32,
        capability=capability,
        index_block=None if config.attention.sparse is None else TILE,
    )


def describe_backends(plans: Iterable[PreparedPlan], tensors: Problem, backend: str) -> list[str]:
    """One line for each kind of piece, the most frequent first, such as "2 causal 512 x 512: forward triton, ...".

    `plans` are those of some ranks. ConfigError when `backend` cannot compute a piece.
    """
    found: dict[str, tuple[Counter[str], Counter[str]]] = defaultdict(lambda: (Counter(), Counter()))
    for prepared in plans:
        for backward in (False, True):
            for piece, problem in problems(prepared, tensors, backward):
                try:
                    calls = choose(problem, piece.mask, backend).parts
                except ValueError as error:
                    raise ConfigError(str(error)) from error
                found[_kind(piece)][backward][in_words(calls)] += 1
    by_count = sorted(found.items(), key=lambda item: -item[1][0].total())
    return [
        f"{forward.total():,} {kind}: forward {' or '.join(forward)}, backward {' or '.join(backward)}"
        for kind, (forward, backward) in by_count
    ]


def _kind(piece: PreparedPiece) -> str:
    keys = sum(piece.kv.sizes)
    offset = TileMap.of(piece.mask, keys).offset
    kind = {None: "general", keys: "full"}.get(offset, "causal")
    return f"{kind} {piece.mask.rows} x {keys}"
