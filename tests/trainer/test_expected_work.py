"""What `farspan plan` takes sparse layers to compute, and what their lists take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from farspan.kernels import masks
from farspan.kernels.triton import backend
from farspan.parallel import orders, plans
from farspan.parallel.degrees import Degrees
from farspan.parallel.verify import verify
from farspan.trainer.budgets import Budgets
from farspan.trainer.config import RunConfig
from farspan.trainer.describe_plan import describe_plan
from farspan.trainer.expected_work import expected_work
from farspan.trainer.memory_estimate import estimate_memory
from farspan.trainer.sparse_memory import estimation_bytes, selection_bytes

LENGTH, BLOCKS = 4096, 32


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests interpret Triton's kernels; what is predicted is a GPU, which compiles them."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


def config_of(sparse: dict[str, Any] | None, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"preset": "qwen2.5-3b"},
        "data": {"sources": ["python-stdlib"], "directory": "prepared/x"},
        "train": {"steps": 1, "tokens_per_step": LENGTH, "sequence_length": LENGTH},
        "parallel": {"plan": "ring", "context": 4, "order": "striped"},
        "attention": {"backend": "auto", "sparse": sparse},
    }
    return RunConfig.model_validate(tree | {name: tree.get(name, {}) | keys for name, keys in sections.items()})


def said(config: RunConfig, processes: int = 4) -> str:
    lines: list[str] = []
    describe_plan(config, processes, lines.append)
    return " ".join(" ".join(lines).split())


def density_of(sparse: dict[str, Any]) -> float:
    work = expected_work(config_of(sparse))
    assert work is not None
    return work.density


def test_nothing_is_expected_where_training_is_dense() -> None:
    assert expected_work(config_of(None)) is None
    assert expected_work(config_of({"train": False})) is None


def test_caps_count_the_longest_diagonals_and_columns() -> None:
    caps = {"most_columns": 10, "most_diagonals": 3, "sinks": 6, "local_blocks": 2}
    tiles, keys = sum(BLOCKS - distance for distance in range(5)), sum(LENGTH - key for key in range(16))
    expected = tiles / (BLOCKS * (BLOCKS + 1) / 2) + keys / (LENGTH * (LENGTH + 1) / 2)
    assert density_of(caps) == pytest.approx(expected)
    assert density_of({}) == 1  # more than there are
    assert density_of(caps | {"expected_density": 0.05}) == 0.05


def test_budgets_count_by_head(tmp_path: Path) -> None:
    path, config = tmp_path / "budgets.yaml", config_of({"dense_layers": [0]})
    layers, heads = config.model.layers, config.model.heads
    few, many = [0] * heads, [30] * (heads // 2) + [0] * (heads // 2)
    Budgets(LENGTH, 0.9, 1, 0.9, [[], *[few] * (layers - 1)], [[], *[many] * (layers - 1)]).write(path)
    options = {"sinks": 0, "local_blocks": 2, "dense_layers": [0]}
    two = (2 * BLOCKS - 1) / (BLOCKS * (BLOCKS + 1) / 2)
    assert density_of(options | {"budgets": str(path)}) == pytest.approx((1 + two) / 2)


def test_other_estimators_have_bounds_of_their_own() -> None:
    keys = sum(min(token // 512, 2) * 512 + token % 512 + 1 for token in range(LENGTH))
    moba = {"estimator": "moba", "chunk": 512, "top_k": 3}
    assert density_of(moba) == pytest.approx(keys / (LENGTH * (LENGTH + 1) / 2))
    assert density_of({"estimator": "xattention"}) == 1
    for sparse in (moba, {"estimator": "xattention"}):
        work = expected_work(config_of(sparse))
        assert work is not None
        assert work.columns == 0
        assert density_of(sparse | {"expected_density": 0.05}) == 0.05
        assert "most_columns" not in said(config_of(sparse))


def test_memory_counts_the_indexes_of_all_layers() -> None:
    """512K tokens, 16 heads: 32 MiB of XAttention's and 128 MiB of MoBA's in each of 36 layers."""
    long = {"tokens_per_step": 2**19, "sequence_length": 2**19, "steps": 1}
    ranks = Degrees(1, 4, 1)

    def kept(sparse: dict[str, Any] | None) -> int:
        config = config_of(sparse, train=long, model={"preset": "qwen2.5-3b", "vocabulary_size": 151936})
        return estimate_memory(config, ranks).kept

    assert kept({"estimator": "xattention"}) - kept(None) == 36 * (32 << 20)
    assert kept({"estimator": "moba"}) - kept(None) == 36 * (128 << 20)
    assert kept({"estimator": "moba", "train": False}) == kept(None)


def test_memory_counts_the_probes_of_documents() -> None:
    """Of each: 8 bytes for each of 64 rows, each of 8 tiles of a rank's keys and each of 16 heads."""

    def found(documents: int, across: bool) -> int:
        attention = {"across_documents": across, "sparse": {"documents": documents}}
        config = config_of(None, attention=attention)
        assert config.attention.sparse is not None
        return estimation_bytes(config, config.attention.sparse, LENGTH // 4)

    assert found(2, False) - found(0, False) == 2 * 64 * 8 * 8 * 16
    assert found(2, True) == found(0, True) == found(0, False)


def test_a_plan_says_what_it_assumed_and_what_that_gains() -> None:
    long = {"tokens_per_step": 131072, "sequence_length": 131072, "steps": 1}
    text = said(config_of({"expected_density": 0.05, "dense_layers": [0]}, train=long))
    assert (
        "35 of 36 layers select what they compute, 5 % of causal attention by attention.sparse.expected_density" in text
    )
    assert "layer 5 % of attention in rows of one document: forward" in text
    assert "with dense attention in all layers" in text
    assert "lists of selected tiles" in text
    dense = said(config_of(None, train=long))
    assert "selecting" not in dense
    assert "lists of" not in dense


def test_a_denser_expectation_takes_longer() -> None:
    long = {"tokens_per_step": 131072, "sequence_length": 131072, "steps": 1}

    def seconds(sparse: dict[str, Any] | None) -> float:
        return float(said(config_of(sparse, train=long)).split(" s expected")[0].split()[-1].replace(",", ""))

    found = [seconds(sparse) for sparse in ({"expected_density": 0.05}, {"expected_density": 0.2}, None)]
    assert found == sorted(found)
    assert found[0] < found[2] / 2


def test_lists_have_room_for_all_visible_tiles() -> None:
    """One device: int32 over the triangle and over keys, fp32 gradients of columns twice; a byte a tile of the mask."""
    config, heads, columns = config_of({}, parallel={"plan": "single", "context": 1}), (16, 2), 100
    order, mask = orders.contiguous(LENGTH, 1), masks.causal(LENGTH)
    plan = plans.build("single", order, mask, heads)
    visible = verify(plan, order, mask).visible
    expected = BLOCKS**2 + 16 * (4 * (BLOCKS**2 // 2 + BLOCKS + LENGTH) + 2 * 2 * 4 * columns * 128)
    assert selection_bytes(config, plan, visible, columns) == expected
    one = Degrees(1, 1, 1)
    assert estimate_memory(config, one, 0, 100 << 30).working > 100 << 30
