"""The loss law under Star Attention: loss and all gradients are those of one rank, for hand-made rows of both modes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor

from farspan.data.rows import IGNORED, Row
from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

LENGTH = 87
# Documents that are dense, and such as are not; where each one's answer begins is a third of the way after its context.
ROWS = (([0, 5, 40, 87], [0, 26, 33]), ([0, 60, 87], [41, 20]))
ARRANGEMENTS = (("star", "two_class"), ("ring", "zigzag"), ("ring", "two_class"), ("all_gather", "striped"))


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


def config_of(context: int, mode: str, plan: str, order: str) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 2},
        "model": {
            "vocabulary_size": 64,
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward_size": 48,
        },
        "data": {"sources": ["unused"], "directory": "unused"},
        "train": {"steps": 1, "sequence_length": LENGTH, "tokens_per_step": 2 * LENGTH, "micro_batch_rows": 2},
        "parallel": {"context": context, "plan": plan, "order": order, "stripe": 4},
        "attention": {"star": {"block": 8, "anchor": 5, "mode": mode}},
    }
    return RunConfig.model_validate(tree)


def step(rank: int, world: int, mode: str, arrangements: list[tuple[str, str]]) -> list[dict[str, Tensor]]:
    """Loss and gradients in fp64, summed over the ranks, for each plan and order."""
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
        for plan_name, order in arrangements:
            config = config_of(world, mode, plan_name, order)
            batch = Arrangement(config, world).batch(rows(mode), rank)
            plan = build_plan(config, plan_name, batch.order, batch.mask)
            verify(plan, batch.order, batch.mask)
            assert (batch.order.roaming is not None) == (order == "two_class")
            model = Decoder(config.model, Sharding(seed=1), recomputation=Recomputation("selective")).double()
            total, _ = model(
                DecoderInput(
                    batch.tokens,
                    batch.labels,
                    batch.rotary_positions,
                    prepare(plan, batch.order, batch.mask, rank),
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


@pytest.mark.parametrize("mode", ["lm", "sft"])
def test_loss_and_gradients_are_those_of_one_rank(pool: Pool, mode: str) -> None:
    ((alone,),) = pool.run(1, step, mode, [("single", "contiguous")])
    assert all(float(gradient.abs().max()) > 0 for gradient in alone.values())
    for world in (2, 4):
        for arrangement, found in zip(ARRANGEMENTS, pool.run(world, step, mode, list(ARRANGEMENTS))[0], strict=True):
            for name, wanted in alone.items():
                difference = float((found[name] - wanted).abs().max() / wanted.abs().max())
                assert difference < 1e-9, (world, arrangement, name, difference)


def test_answers_teach_the_context(pool: Pool) -> None:
    """Tokens of the context alone have no label, and still the embedding of one that is seen nowhere else learns."""
    ((alone,),) = pool.run(1, step, "sft", [("single", "contiguous")])
    made = rows("sft")
    in_context = set(made[1].tokens[:41].tolist())
    elsewhere = {*made[0].tokens.tolist(), *made[1].tokens[41:].tolist()}
    only = sorted(in_context - elsewhere)
    assert only
    assert bool((alone["embedding.weight"][only].abs().amax(1) > 0).all())
