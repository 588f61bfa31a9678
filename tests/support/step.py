"""One optimizer step's loss and gradients, in fp64, from a configuration and rows made by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.data.rows import IGNORED, Row
from farspan.trainer.config import RunConfig

LENGTH = 87
# Documents that are dense, and such as are not; where each one's answer begins is a third of the way after its context.
ROWS = (([0, 5, 40, 87], [0, 26, 33]), ([0, 60, 87], [41, 20]))


def rows(mode: str) -> list[Row]:
    """With question and answer all labels but those of answers are missing."""
    generator = np.random.default_rng(3)
    made = []
    for bounds, contexts in ROWS:
        tokens = generator.integers(0, 64, LENGTH)
        labels, positions = np.full(LENGTH, IGNORED), np.zeros(LENGTH, np.int64)
        for (begin, end), context in zip(pairwise(bounds), contexts, strict=True):
            positions[begin:end] = np.arange(end - begin)
            answer = begin + context + (end - begin - context) // 3 if mode == "sft" else begin
            labels[answer : end - 1] = tokens[answer + 1 : end]
        valid = int((labels != IGNORED).sum())
        given = np.array(contexts) if mode == "sft" else None
        made.append(Row(tokens, labels, np.array(bounds), positions, valid, given))
    return made


# A plan, an order, and further keys of the section `parallel`.
Layout = tuple[str, str, dict[str, int]]


def config_of(context: int, attention: dict[str, Any], layout: Layout) -> RunConfig:
    """Of three layers."""
    plan, order, keys = layout
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 2},
        "model": {
            "vocabulary_size": 64,
            "hidden_size": 32,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward_size": 48,
        },
        "data": {"sources": ["unused"], "directory": "unused"},
        "train": {"steps": 1, "sequence_length": LENGTH, "tokens_per_step": 2 * LENGTH, "micro_batch_rows": 2},
        "parallel": {"context": context, "plan": plan, "order": order, "stripe": 4, **keys},
        "attention": attention,
    }
    return RunConfig.model_validate(tree)


def step(rank: int, world: int, attention: dict[str, Any], mode: str, layouts: list[Layout]) -> list[dict[str, Tensor]]:
    """Loss and gradients, summed over the ranks, for each layout."""
    from farspan.models.decoder import Decoder, DecoderInput
    from farspan.models.layers import Sharding
    from farspan.models.recompute import Recomputation
    from farspan.parallel.degrees import Degrees
    from farspan.parallel.mesh import Mesh
    from farspan.parallel.prepare import prepare
    from farspan.parallel.verify import verify
    from farspan.trainer.arrangement import Arrangement
    from farspan.trainer.loss import LossLaw
    from farspan.trainer.plan_choice import build_plan

    mesh = Mesh.create(Degrees(1, world, 1), torch.device("cpu"))
    results = []
    try:
        for layout in layouts:
            config = config_of(world, attention, layout)
            arrangement = Arrangement(config, world)
            batch = arrangement.batch(rows(mode), rank)
            assert (batch.order.roaming is not None) == (layout[1] == "two_class")
            prepared = {}
            for seen, mask in batch.masks.items():
                plan = build_plan(config, layout[0], batch.order, mask)
                verify(plan, batch.order, mask)
                prepared[seen] = prepare(plan, batch.order, mask, rank)
            model = Decoder(config.model, Sharding(seed=1), recomputation=Recomputation("selective")).double()
            total, _ = model(
                DecoderInput(
                    batch.tokens,
                    batch.labels,
                    batch.rotary_positions,
                    [prepared[seen] for seen in arrangement.layers],
                    mesh.links,
                )
            )
            law = LossLaw.of_step(batch.valid, mesh.loss, mesh.device)
            assert law.valid_tokens == sum(row.valid for row in rows(mode))
            law.objective(total).backward()
            found = {"loss": torch.tensor(law.mean(total))}
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                dist.all_reduce(parameter.grad)
                found[name] = parameter.grad / world
            results.append(found)
    finally:
        mesh.destroy()
    return results
