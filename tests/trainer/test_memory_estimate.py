"""The estimate against peaks that were measured, and against what each key is documented to do."""

from __future__ import annotations

from typing import Any

import pytest

from farspan.parallel.degrees import Degrees
from farspan.trainer.config import RunConfig
from farspan.trainer.memory_estimate import estimate_memory, remedies

GIB = 2**30


def _config(length: int = 32768, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"preset": "qwen2.5-3b"},
        "data": {"sources": ["python-stdlib"], "directory": "prepared/x"},
        "train": {"steps": 1, "tokens_per_step": length, "sequence_length": length},
        "parallel": {"plan": "single", "order": "contiguous"},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return RunConfig.model_validate(tree)


ONE = Degrees(1, 1, 1)


@pytest.mark.parametrize(("length", "measured"), [(32768, 65.5), (65536, 78.6), (131072, 104.8)])
def test_measured_peaks_of_whole_steps(length: int, measured: float) -> None:
    """Qwen2.5-3B on one H200, ZeRO 1, selective recomputation (docs/measurements.md)."""
    assert estimate_memory(_config(length), ONE).tensors / GIB == pytest.approx(measured, rel=0.01)


def test_what_recomputation_keeps() -> None:
    """By layer and token: the input, attention's out and lse; or all that autograd saves."""
    tokens, layers, hidden, heads = 32768, 36, 2048, 16
    angles = 4 * tokens * 128
    kept = {mode: estimate_memory(_config(memory={"recompute": mode}), ONE).kept for mode in ("full", "selective")}
    assert kept["full"] == layers * tokens * 2 * hidden + angles
    assert kept["selective"] - kept["full"] == layers * tokens * (2 * hidden + 4 * heads)
    none = estimate_memory(_config(memory={"recompute": "none"}), ONE)
    some = estimate_memory(_config(memory={"keep_layers": 9}), ONE)
    saved = (none.kept - angles) / layers
    assert some.kept == pytest.approx(27 / 36 * (kept["selective"] - angles) + 9 * saved + angles)
    offloaded = estimate_memory(_config(memory={"offload": True}), ONE)
    assert offloaded.kept - angles == pytest.approx(3 / 36 * (kept["selective"] - angles))


@pytest.mark.parametrize(("stage", "weights", "gradients", "optimizer"), [(1, 2, 4, 3), (2, 2, 1, 3), (3, 0.5, 1, 3)])
def test_what_zero_divides(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    """Bytes a weight on each of 4 data x context ranks."""
    config = _config(parallel={"plan": "ring", "context": 2, "zero_stage": stage})
    memory = estimate_memory(config, Degrees(2, 2, 1))
    count = config.model.parameters()
    assert memory.weights == pytest.approx(weights * count, abs=4)
    assert memory.gradients == pytest.approx(gradients * count, abs=4)
    assert memory.optimizer == pytest.approx(optimizer * count, abs=4)


def test_stage_0_in_fp32_has_no_second_weights() -> None:
    memory = estimate_memory(_config(train={"dtype": "fp32"}, parallel={"zero_stage": 0}), ONE)
    assert memory.weights + memory.gradients + memory.optimizer == 16 * _config().model.parameters()


def test_ranks_divide_what_tokens_and_layers_take() -> None:
    alone = estimate_memory(_config(), ONE)
    shared = estimate_memory(_config(parallel={"plan": "ring", "context": 2}), Degrees(1, 2, 1))
    assert shared.kept == alone.kept / 2
    tensor = _config(parallel={"tensor": 2})
    divided = _config(parallel={"tensor": 2, "sequence_parallel": True})
    apart, more = estimate_memory(tensor, Degrees(1, 1, 2)), estimate_memory(divided, Degrees(1, 1, 2))
    assert apart.weights == alone.weights / 2
    assert alone.kept > apart.kept > more.kept > alone.kept / 2.1


def test_a_short_row_is_fullest_in_its_loss() -> None:
    memory = estimate_memory(_config(8192), ONE)
    assert memory.moment == "loss"
    smaller = estimate_memory(_config(8192, train={"loss_chunk_tokens": 1024}), ONE)
    assert smaller.working < memory.working


def test_what_a_plan_holds_counts_where_attention_is_the_fullest_moment() -> None:
    config = _config(131072, parallel={"plan": "ring", "context": 2})
    alone = estimate_memory(config, Degrees(1, 2, 1))
    assert alone.moment == "feed-forward backward"
    much = estimate_memory(config, Degrees(1, 2, 1), 100 * GIB)
    assert much.moment == "attention backward"
    assert much.working > 100 * GIB


def test_each_remedy_makes_it_fit() -> None:
    config = _config(524288, memory={"keep_layers": 4})
    available = int(139.8 * GIB)
    assert estimate_memory(config, ONE).total > available
    found = list(remedies(config, ONE, 0, available))
    assert "memory.offload: true" in found
    assert found[-1] == "parallel.context: 4 with launch.processes: 4"
    context = _config(524288, memory={"keep_layers": 4}, parallel={"plan": "ring", "context": 4})
    assert estimate_memory(context, Degrees(1, 4, 1)).total <= available
    half = _config(524288, memory={"keep_layers": 4}, parallel={"plan": "ring", "context": 2})
    assert estimate_memory(half, Degrees(1, 2, 1)).total > available
    assert list(remedies(_config(), ONE, 0, 10 * GIB)) == []


def test_a_context_that_takes_data_ranks_needs_no_more_processes() -> None:
    config = _config(524288, train={"tokens_per_step": 8 * 524288})
    found = list(remedies(config, Degrees(8, 1, 1), 0, int(139.8 * GIB)))
    assert "parallel.context: 4" in found or "parallel.context: 2" in found
