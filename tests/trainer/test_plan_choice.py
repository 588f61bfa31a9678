"""`parallel.plan: auto`."""

from __future__ import annotations

from typing import Any

import pytest

from farspan.kernels import IntervalMask, masks
from farspan.kernels.triton import backend
from farspan.parallel import orders, plans
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.plan_choice import plan_name


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests interpret Triton's kernels; what is predicted is a GPU, which compiles them."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


def _config(context: int, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"preset": "qwen2.5-3b"},
        "data": {"sources": ["python-stdlib"], "directory": "prepared/x"},
        "train": {"steps": 1, "tokens_per_step": 65536, "sequence_length": 65536},
        "parallel": {"plan": "auto", "context": context},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return RunConfig.model_validate(tree)


def test_the_choice_is_a_plan_and_says_why() -> None:
    config = _config(4)
    order, mask = orders.zigzag(65536, 4), masks.causal(65536)
    name, reason = plan_name(config, order, lambda: mask)
    assert name in plans.PLANS
    assert reason is not None
    assert reason.startswith(f"parallel.plan auto is {name}: ")
    assert reason.index(f"{name} ", len("parallel.plan auto is ") + len(name)) < reason.index("(cluster h200)")
    assert " ms" in reason
    assert "single" not in reason
    assert plan_name(config, order, lambda: mask) == (name, reason)


def test_nothing_is_predicted_that_nobody_asked_for() -> None:
    def no_mask() -> IntervalMask:
        raise AssertionError("not needed")

    order = orders.zigzag(65536, 4)
    assert plan_name(_config(4, parallel={"plan": "ring"}), order, no_mask) == ("ring", None)
    name, reason = plan_name(_config(1), orders.zigzag(65536, 1), no_mask)
    assert name == "single"
    assert reason is not None


def test_slow_links_change_the_choice(tmp_path: Any) -> None:
    """Packed documents on a contiguous order: the ring sends what neighbours need from rank to rank, not straight."""
    config = _config(8, parallel={"order": "contiguous"})
    order, mask = orders.contiguous(65536, 8), masks.full(65536)
    _, reason = plan_name(config, order, lambda: mask)
    slow = tmp_path / "slow.yaml"
    slow.write_text(
        "gpu: X\ncompute_capability: [9, 0]\ngpus_per_node: 2\nmemory_gib: 80\nmatrix_tflops: 700\n"
        "memory_gigabytes_per_second: 3000\ninner: {gigabytes_per_second: 300}\nouter: {gigabytes_per_second: 0.1}\n"
    )
    name, slower = plan_name(config.model_copy(update={"cluster": str(slow)}), order, lambda: mask)
    # On slow links between nodes a block had better enter each node once, as on its way round the ring.
    assert name == "ring"
    assert slower != reason


def test_no_rates_no_choice() -> None:
    config = _config(2, attention={"backend": "reference"})
    with pytest.raises(ConfigError, match=r"no.* for attention\.backend reference; set parallel\.plan to ring, all_"):
        plan_name(config, orders.zigzag(65536, 2), lambda: masks.causal(65536))
