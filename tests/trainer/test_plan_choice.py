"""`parallel.plan: auto`."""

from __future__ import annotations

import re
from pathlib import Path
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
    divisor = "to a divisor of 4)"
    missing = f"not judged: hierarchical_ring (set parallel.inner {divisor}, usp (set parallel.ulysses {divisor}"
    assert reason.endswith(f"; {missing}")
    _, reason = plan_name(_config(4, parallel={"inner": 2, "ulysses": 2}), order, lambda: mask)
    assert "not judged" not in str(reason)
    assert {"hierarchical_ring", "usp"} < _milliseconds(reason).keys()


def test_a_sparse_wire_is_for_plans_that_send_keys_alone() -> None:
    sparse = {"attention": {"sparse": {"expected_density": 0.05}}}
    wire = _config(4, parallel={"sparse_wire": True, "inner": 2, "ulysses": 2, "order": "striped"}, **sparse)
    _, reason = plan_name(wire, orders.striped(65536, 4, 128), lambda: masks.causal(65536), 0.05)
    assert _milliseconds(reason).keys() == {"ring", "hierarchical_ring", "all_gather"}
    _, dense = plan_name(wire, orders.striped(65536, 4, 128), lambda: masks.causal(65536))
    assert all(_milliseconds(reason)[name] < slower for name, slower in _milliseconds(dense).items())


def test_nothing_is_predicted_that_nobody_asked_for() -> None:
    def no_mask() -> IntervalMask:
        raise AssertionError("not needed")

    order = orders.zigzag(65536, 4)
    assert plan_name(_config(4, parallel={"plan": "ring"}), order, no_mask) == ("ring", None)
    name, reason = plan_name(_config(1), orders.zigzag(65536, 1), no_mask)
    assert name == "single"
    assert reason is not None


def _milliseconds(reason: str | None) -> dict[str, float]:
    assert reason is not None
    return {name: float(number.replace(",", "")) for name, number in re.findall(r"(\w+) ([\d.,]+) ms", reason)}


def test_links_count(tmp_path: Path) -> None:
    """Between slow nodes no plan is hidden; each sends 6 or 7 blocks of keys over one link, and gradients back."""
    config = _config(8, parallel={"order": "contiguous"})
    order, mask = orders.contiguous(65536, 8), masks.full(65536)
    _, fast = plan_name(config, order, lambda: mask)
    slow = tmp_path / "slow.yaml"
    slow.write_text(
        "gpu: X\ncompute_capability: [9, 0]\ngpus_per_node: 2\nmemory_gib: 80\nmatrix_tflops: 700\n"
        "memory_gigabytes_per_second: 3000\ninner: {gigabytes_per_second: 300}\nouter: {gigabytes_per_second: 0.1}\n"
    )
    _, reason = plan_name(config.model_copy(update={"cluster": str(slow)}), order, lambda: mask)
    block = 2 * 8192 * 2 * 128 * 2 / 0.1e9 * 1e3  # milliseconds of the keys and values of one rank
    # Forward once, backward once more, and gradients of twice the bytes.
    assert _milliseconds(reason)["all_gather"] == pytest.approx(6 * 4 * block, rel=0.1)
    assert _milliseconds(reason)["ring"] == pytest.approx(7 * 4 * block, rel=0.1)
    assert max(_milliseconds(fast).values()) < block


def test_no_rates_no_choice() -> None:
    config = _config(2, attention={"backend": "reference"})
    with pytest.raises(ConfigError, match=r"no.* for attention\.backend reference; set parallel\.plan to ring, all_"):
        plan_name(config, orders.zigzag(65536, 2), lambda: masks.causal(65536))
