"""The expected time of a step: closed forms of its parts, and measured steps."""

from __future__ import annotations

from typing import Any

import pytest

from farspan.kernels import masks
from farspan.parallel import orders, plans
from farspan.parallel.cluster import load_cluster
from farspan.parallel.degrees import Degrees
from farspan.parallel.verify import verify
from farspan.trainer.config import RunConfig
from farspan.trainer.plan_choice import predict_attention
from farspan.trainer.step_estimate import StepEstimate, estimate_step


def _estimate(length: int, processes: int, rows: int = 1, **sections: dict[str, Any]) -> StepEstimate:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"preset": "qwen2.5-3b"},
        "data": {"sources": ["python-stdlib"], "directory": "prepared/x"},
        "train": {"steps": 1, "tokens_per_step": rows * length, "sequence_length": length},
        "parallel": {},
        "attention": {"backend": "auto"},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    config = RunConfig.model_validate(tree)
    parallel, cluster = config.parallel, load_cluster("h200")
    degrees = Degrees.divide(processes, parallel.context, parallel.tensor)
    order, mask = orders.build(parallel.order, length, parallel.context), masks.causal(length)
    heads = (16 // parallel.tensor, 2 // parallel.tensor)
    plan = plans.build("ring" if parallel.context > 1 else "single", order, mask, heads)
    found = verify(plan, order, mask, head_dim=128)
    lines = predict_attention(config, cluster, plan, order, found.visible, found.elements)
    return estimate_step(config, degrees, cluster, [lines] * config.model.layers, order.slots)


@pytest.mark.parametrize(("length", "measured"), [(32768, 2.505), (65536, 6.978), (131072, 22.149)])
def test_measured_steps(length: int, measured: float) -> None:
    """One H200, selective recomputation. Expected is what kernels reach by themselves, so never more than that."""
    step = _estimate(length, 1)
    assert 0.85 * measured < step.total < 1.02 * measured
    assert step.exposed == 0


def test_parts_by_closed_forms() -> None:
    length, layers = 65536, 36
    weights = layers * (2 * 2048 * (2048 + 256) + 3 * 2048 * 11008)
    step = _estimate(length, 1)
    assert step.linear == pytest.approx(8 * weights * length / 790e12)  # forward, twice backward, and recomputed
    assert _estimate(length, 1, memory={"recompute": "none"}).linear == pytest.approx(6 / 8 * step.linear)
    assert _estimate(length, 1, memory={"keep_layers": 18}).linear == pytest.approx(7 / 8 * step.linear)
    full = _estimate(length, 1, memory={"recompute": "full"})
    assert step.attention < full.attention < 2 * step.attention
    assert _estimate(length, 1, rows=3).attention == pytest.approx(3 * step.attention)


def test_what_ranks_exchange() -> None:
    """Gradients in fp32 and weights in bf16, over the shard ranks; hidden states over the tensor ranks."""
    count, ranks, bandwidth = 3_085_938_688, 2, 362e9
    assert _estimate(32768, 2, parallel={"context": 2}).reduction == pytest.approx(
        (ranks - 1) / ranks * (2 * 4 + 2) * count / bandwidth, rel=1e-3
    )
    tensor = _estimate(32768, 2, parallel={"tensor": 2})
    assert tensor.tensor == pytest.approx(6 * 36 * 2 * (ranks - 1) / ranks * 2 * 32768 * 2048 / bandwidth)
    assert tensor.reduction == 0
    nodes = _estimate(262144, 16, parallel={"context": 16})
    one = _estimate(131072, 8, parallel={"context": 8})
    assert nodes.reduction > one.reduction  # 8 x 45 GB/s between nodes are a little less than 362 inside
    three = _estimate(131072, 8, parallel={"context": 8, "zero_stage": 3})
    assert three.reduction > 0
