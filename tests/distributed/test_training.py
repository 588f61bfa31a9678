"""The loss does not depend on how many ranks share a sequence, a layer or the optimizer's state."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.corpus import prepare_small
from support.pool import Pool
from support.training import train_runs

from farspan.data.prepared import load_prepared
from farspan.parallel import orders
from farspan.parallel.degrees import Degrees
from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

MODEL = {
    "hidden_size": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 12,
    "feed_forward_size": 96,
    "qkv_bias": True,
    "qk_norm": True,
}
LAYOUTS = [(2, 1, 0), (4, 1, 1), (2, 2, 1), (2, 1, 3)]


def make_config(directory: Path, prepared: Path, context: int, tensor: int, zero: int, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": {**MODEL, "tied_embeddings": changes.pop("tied", False)},
        "data": {"sources": ["unused"], "directory": str(prepared)},
        "train": {
            "steps": 5,
            "sequence_length": changes.pop("length", 101),
            "tokens_per_step": changes.pop("tokens_per_step", 404),
            "micro_batch_rows": changes.pop("micro_batch_rows", 1),
            "dtype": "fp32",
            "loss_chunk_tokens": 64,
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "attention": {"star": changes.pop("star", None), "window": changes.pop("window", None)},
        "eval": {"rows": 3},
    }
    tree["parallel"] = {"context": context, "tensor": tensor, "zero_stage": zero, **changes}
    return RunConfig.model_validate(tree)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("corpus"))


def worst(reference: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    """Largest relative difference in loss, gradient norm and held-out loss over all steps."""
    assert [row["step"] for row in rows] == [row["step"] for row in reference] == [1, 2, 3, 4, 5]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in reference]
    keys = ("loss", "grad_norm", "eval_loss")
    pairs = [(a[key], b[key]) for a, b in zip(reference, rows) for key in keys if key in a]
    assert len(pairs) == 11
    return max(abs(a - b) / abs(a) for a, b in pairs)


def compare(
    pool: Pool, tmp_path: Path, prepared: Path, layouts: list[tuple[int, int, int]], variants: list[dict[str, Any]]
) -> None:
    """All variants on all layouts agree with one rank at ZeRO 0, which each variant's batch shape has of its own."""
    shape_keys = ("length", "tokens_per_step", "micro_batch_rows", "tied", "star", "window")

    def shape_of(variant: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(variant.get(key)) for key in shape_keys)

    shapes = {shape_of(variant): variant for variant in variants}
    alone = {
        shape: make_config(
            tmp_path / f"alone{i}", prepared, 1, 1, 0, **{k: v for k, v in variant.items() if k in shape_keys}
        )
        for i, (shape, variant) in enumerate(shapes.items())
    }
    references = dict(zip(alone, pool.run(1, train_runs, list(alone.values()))[0]))
    differences = {}
    for context, tensor, zero in layouts:
        configs = [
            make_config(tmp_path / f"c{context}t{tensor}z{zero}v{i}", prepared, context, tensor, zero, **variant)
            for i, variant in enumerate(variants)
        ]
        for variant, rows in zip(variants, pool.run(context * tensor, train_runs, configs)[0]):
            reference = references[shape_of(variant)]
            differences[context, tensor, zero, str(variant)] = worst(reference, rows)
    print(f"largest relative difference {max(differences.values()):.1e} over {len(differences)} runs")
    assert {case: value for case, value in differences.items() if not value < 1e-5} == {}


@pytest.mark.full
def test_every_layout_order_and_plan_agrees_with_one_rank(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    variants = [{"order": o, "plan": p, "stripe": 8} for o, p in product(("zigzag", "striped"), ("ring", "all_gather"))]
    compare(pool, tmp_path, prepared, LAYOUTS, variants)


def test_a_sample_of_layouts_orders_and_plans_agrees_with_one_rank(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    """Pairwise: every layout, order and plan is seen, and a tied embedding with two rows a micro-batch."""
    variants = [{"order": "zigzag", "plan": "ring"}, {"order": "striped", "plan": "all_gather", "stripe": 8}]
    compare(pool, tmp_path, prepared, LAYOUTS[:2], variants[:1])
    (tmp_path / "more").mkdir()
    compare(pool, tmp_path / "more", prepared, LAYOUTS[2:], [{**variants[1], "tied": True, "micro_batch_rows": 2}])


def test_star_attention_agrees_with_one_rank_under_any_plan(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    """Text all of whose tokens carry loss; rows hold several documents, some of them shorter than two blocks."""
    star = {"star": {"block": 16, "anchor": 8, "global_fraction": 0.3}}
    variants = [
        {"plan": "star", "order": "two_class", **star},
        {"plan": "ring", "order": "zigzag", **star},
        {"plan": "star", "order": "two_class", "micro_batch_rows": 2, **star},
    ]
    compare(pool, tmp_path, prepared, [(2, 1, 1)], variants)
    (tmp_path / "more").mkdir()
    compare(pool, tmp_path / "more", prepared, [(4, 1, 1)], [*variants[:1], {**variants[1], "plan": "group_cast"}])


def test_windows_between_full_layers_agree_with_one_rank(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    """From the configuration to the losses of a run, with layers that are computed again."""
    window = {"window": {"width": 24, "sinks": 1, "full_layers": [1]}}
    compare(pool, tmp_path, prepared, [(4, 1, 1)], [{"plan": "ring", "order": "zigzag", **window}])


def test_a_rank_whose_tokens_are_all_masked(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    """Rows of five tokens on four ranks: in stripes of two, the last rank holds padding alone."""
    assert not orders.build("striped", 5, 4).real(3).any()
    variant = {"order": "striped", "plan": "ring", "length": 5, "tokens_per_step": 20}
    compare(pool, tmp_path, prepared, [(4, 1, 1)], [variant])


def test_the_small_corpus_has_documents_of_one_token_and_odd_lengths(prepared: Path) -> None:
    from farspan.data.corpus import Corpus

    lengths = Corpus(load_prepared(prepared), "train").lengths
    assert lengths.min() == 1
    assert (lengths % 2 == 1).any()
    assert (lengths > 404).any()
    assert Degrees.divide(4, 2, 2).data == 1
