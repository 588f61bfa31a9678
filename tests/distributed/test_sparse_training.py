"""Sparse attention in a decoder: the loss does not depend on the ranks, and a layer is estimated once a micro-batch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor

from farspan.data.rows import Row
from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

LENGTH, VOCABULARY = 8 * 128 - 5, 64
SPARSE = {"mass": 0.3, "probes": 16, "most_columns": 8, "most_diagonals": 2, "sinks": 2, "local_blocks": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "xattention": {"estimator": "xattention", "threshold": 0.4},
    "moba": {"estimator": "moba", "chunk": 128, "top_k": 3},
}


def config_of(context: int, sparse: dict[str, Any], **parallel: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 2},
        "model": {
            "vocabulary_size": VOCABULARY,
            "hidden_size": 32,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward_size": 48,
            "initializer_std": 0.3,
        },
        "data": {"sources": ["unused"], "directory": "unused"},
        "train": {"steps": 1, "sequence_length": LENGTH, "tokens_per_step": LENGTH, "micro_batch_rows": 1},
        "parallel": {"context": context, "plan": "ring", "order": "striped", **parallel},
        "attention": {"sparse": sparse if "estimator" in sparse else SPARSE | sparse},
    }
    return RunConfig.model_validate(tree)


def row() -> Row:
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, LENGTH)
    labels = np.append(tokens[1:], -100)
    return Row(tokens, labels, np.array([0, LENGTH]), np.arange(LENGTH), LENGTH - 1, None)


def step(rank: int, world: int, sparse: dict[str, Any], parallel: dict[str, Any], recompute: str) -> dict[str, Any]:
    """Loss, gradients summed over the ranks, what the layers selected, and how often anything was estimated."""
    from farspan.models.decoder import Decoder, DecoderInput
    from farspan.models.layers import Sharding
    from farspan.models.recompute import Recomputation
    from farspan.parallel.degrees import Degrees
    from farspan.parallel.estimate import Estimator
    from farspan.parallel.mesh import Mesh
    from farspan.parallel.prepare import prepare
    from farspan.trainer.arrangement import Arrangement
    from farspan.trainer.plan_choice import build_plan
    from farspan.trainer.sparse import Sight, SparseAttention

    config = config_of(world, sparse, **parallel)
    mesh = Mesh.create(Degrees(1, world, 1), torch.device("cpu"))
    try:
        batch = Arrangement(config, world).batch([row()], rank)
        (mask,) = batch.masks.values()
        plan = build_plan(config, config.parallel.plan if world > 1 else "single", batch.order, mask)
        wire = config.parallel.sparse_wire
        prepared = prepare(plan, batch.order, mask, rank, sparse_block=128, sparse_wire=wire)
        selecting = SparseAttention(config)
        group = None if world == 1 else mesh.context
        assert config.attention.sparse is not None
        estimator = Estimator(batch.order, mask, config.attention.sparse.settings, rank, group, "cpu")
        counted = mock.Mock(side_effect=estimator)
        sight = Sight(counted, None, prepared.sieve)
        selectors = selecting.selectors([sight if i in selecting.layers else None for i in range(3)])
        model = Decoder(config.model, Sharding(seed=1), recomputation=Recomputation(recompute)).double()  # type: ignore[arg-type]
        total, _ = model(
            DecoderInput(batch.tokens, batch.labels, batch.rotary_positions, [prepared] * 3, mesh.links, selectors)
        )
        total.backward()
        loss = total.detach().clone()
        dist.all_reduce(loss)
        found: dict[str, Any] = {"loss": loss, "estimates": counted.call_count}
        found["selected"] = {layer: selected.index.to_dense() for layer, selected in selecting.newest.items()}
        gradients: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad
        return found | {"gradients": gradients}
    finally:
        mesh.destroy()


def run(pool: Pool, world: int, recompute: str = "none", parallel: dict[str, Any] | None = None, **sparse: Any) -> Any:
    return pool.run(world, step, sparse, parallel or {}, recompute)[0]


@pytest.fixture(scope="module")
def alone(pool: Pool) -> Any:
    return run(pool, 1)


def test_something_is_left_out(pool: Pool, alone: Any) -> None:
    assert any(float(selected.float().mean()) < 0.5 for selected in alone["selected"].values())
    dense = run(pool, 1, dense_steps=1)
    assert dense["estimates"] == 0
    assert abs(float(dense["loss"] - alone["loss"])) > 1e-3


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {}),
        (4, {}),
        (4, {"plan": "hierarchical_ring", "inner": 2}),
        (4, {"plan": "usp", "ulysses": 2}),
        (2, {"sparse_wire": True}),
        (4, {"plan": "hierarchical_ring", "inner": 2, "sparse_wire": True}),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_ranks(
    pool: Pool, alone: Any, world: int, parallel: dict[str, Any]
) -> None:
    shared = run(pool, world, parallel=parallel)
    check_same(shared, alone)


def check_same(shared: Any, alone: Any) -> None:
    for layer, selected in alone["selected"].items():
        assert torch.equal(shared["selected"][layer], selected)
    assert float(shared["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-11)
    for name, gradient in alone["gradients"].items():
        assert torch.allclose(shared["gradients"][name], gradient, rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_with_a_sparse_wire_changes_no_bit(pool: Pool, recompute: str) -> None:
    wire = {"sparse_wire": True}
    once, again = (run(pool, 2, mode, wire) for mode in ("none", recompute))
    assert torch.equal(again["loss"], once["loss"])
    for name, gradient in once["gradients"].items():
        assert torch.equal(again["gradients"][name], gradient), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_estimates_nothing_again_and_changes_no_bit(pool: Pool, alone: Any, recompute: str) -> None:
    again = run(pool, 1, recompute)
    assert again["estimates"] == alone["estimates"] == 3
    assert torch.equal(again["loss"], alone["loss"])
    for name, gradient in alone["gradients"].items():
        assert torch.equal(again["gradients"][name], gradient), name


def test_dense_layers_estimate_nothing(pool: Pool) -> None:
    assert run(pool, 1, dense_layers=[0, 2])["estimates"] == 1


@pytest.mark.parametrize("estimator", OTHERS)
def test_other_estimators(pool: Pool, estimator: str) -> None:
    """The loss does not depend on the ranks, and a layer that is computed again selects what it selected."""
    sparse = OTHERS[estimator]
    alone = run(pool, 1, **sparse)
    assert all(float(selected.float().mean()) < 0.45 for selected in alone["selected"].values())
    check_same(run(pool, 2, **sparse), alone)
    check_same(run(pool, 4, parallel={"plan": "usp", "ulysses": 2}, **sparse), alone)
    again = run(pool, 2, "full", **sparse)
    assert again["estimates"] == alone["estimates"] == 3
    check_same(again, alone)
