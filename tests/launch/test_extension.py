"""A run that begins with another one's weights: longer rows, learnt with dense and with sparse attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import farspan, last_metrics
from support.corpus import prepare_small

from farspan.data.prepare import prepare

pytestmark = pytest.mark.distributed


def config(folder: Path, name: str, length: int, steps: int, **sections: Any) -> str:
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / name), "seed": 3},
        "launch": {"processes": 1},
        "model": {
            "hidden_size": 64,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "feed_forward_size": 128,
            "rotary_theta": 10_000.0,
        },
        "data": {"sources": ["unused"], "directory": str(folder / "prepared")},
        "train": {"steps": steps, "sequence_length": length, "tokens_per_step": 2048, "dtype": "fp32"},
        "parallel": {"plan": "single", "order": "contiguous"},
        "attention": {"across_documents": True, "backend": "reference"},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "eval": {"rows": 4},
        "checkpoint": {"every": 1000},
    }
    for section, keys in sections.items():
        tree[section] = {**tree[section], **keys}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / f"{name}.yaml")


@pytest.mark.full
def test_sparse_attention_extends_a_context_as_dense_attention_does(tmp_path: Path) -> None:
    """`benchmarks/extension.py`, small: from the same weights over the same tokens, held-out losses within 1 %."""
    prepare_small(tmp_path).rename(tmp_path / "prepared")
    farspan("train", config(tmp_path, "short", 256, 60))
    begun = {"run": {"dir": "", "weights_from": str(tmp_path / "short")}, "model": {"rotary_theta": 80_000.0}}
    for name, attention in (("dense", {}), ("sparse", {"sparse": {"mass": 0.9, "report_every": 5}})):
        begun["run"]["dir"] = str(tmp_path / name)
        said = farspan("train", config(tmp_path, name, 1024, 20, **begun, attention=attention))
        assert f"training begins with the weights of {tmp_path / 'short'}" in said
    short, dense, sparse = (last_metrics(tmp_path / name) for name in ("short", "dense", "sparse"))
    print(f"held-out: short {short['eval_loss']:.4f}, dense {dense['eval_loss']:.4f}, sparse {sparse['eval_loss']:.4f}")
    assert dense["eval_loss"] < short["eval_loss"]
    assert abs(sparse["eval_loss"] / dense["eval_loss"] - 1) < 0.01
    assert 0 < sparse["sparse_density"] < 1


@pytest.mark.full
def test_weights_of_no_run_or_of_another_model_or_tokenizer_are_refused(tmp_path: Path) -> None:
    prepare_small(tmp_path).rename(tmp_path / "prepared")
    farspan("train", config(tmp_path, "short", 256, 1))
    path = config(tmp_path, "long", 512, 1, run={"dir": str(tmp_path / "long"), "weights_from": str(tmp_path)})
    assert "there is no checkpoint to take weights from" in farspan("train", path, code=2)
    path = config(
        tmp_path,
        "long",
        512,
        1,
        run={"dir": str(tmp_path / "long"), "weights_from": str(tmp_path / "short")},
        model={"feed_forward_size": 256, "rotary_theta": 50_000.0},
    )
    said = farspan("train", path, code=2)
    assert "model.feed_forward_size was 128 and is 256" in said
    assert "rotary_theta" not in said
    prepare(
        [str(Path(json.__file__).parent)],
        tmp_path / "other",
        tokenizer=None,
        vocabulary_size=384,
        heldout_fraction=0.2,
        seed=0,
        report=lambda line: None,
    )
    path = config(
        tmp_path,
        "long",
        512,
        1,
        run={"dir": str(tmp_path / "long"), "weights_from": str(tmp_path / "short")},
        data={"directory": str(tmp_path / "other")},
    )
    assert "was trained with another tokenizer than that of data.directory" in farspan("train", path, code=2)
