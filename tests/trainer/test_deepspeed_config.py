"""DeepSpeed's configuration: ours decides, further keys arrive, contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from farspan.parallel.degrees import Degrees
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.deepspeed_config import engine_config


def run_config(deepspeed: object, dtype: str = "fp32", zero_stage: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "runs/test"},
            "model": {"preset": "tiny"},
            "data": {"sources": ["python-stdlib"], "directory": "prepared/test"},
            "train": {
                "steps": 3,
                "tokens_per_step": 12 * 64,
                "sequence_length": 64,
                "micro_batch_rows": 2,
                "dtype": dtype,
            },
            "parallel": {"context": 4, "zero_stage": zero_stage},
            "optimizer": {"gradient_clipping": 0.7},
            "deepspeed": deepspeed,
        }
    )


DEGREES = Degrees(data=3, context=4, tensor=1)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_ours_is_translated(zero_stage: int) -> None:
    made = engine_config(run_config({}, zero_stage=zero_stage), DEGREES)
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 2  # 12 rows over 3 data ranks, 2 at once
    assert made["gradient_clipping"] == 0.7
    assert made["zero_optimization"] == {"stage": zero_stage}
    assert made["communication_data_type"] == "fp32"
    assert "bf16" not in made
    # DeepSpeed's own condition, where context ranks are data-parallel ranks too.
    assert made["train_batch_size"] == 2 * 2 * DEGREES.shard


def test_bf16_accumulates_in_fp32() -> None:
    made = engine_config(run_config({}, dtype="bf16"), DEGREES)
    assert made["bf16"] == {"enabled": True}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["communication_data_type"] == "fp32"


OURS = [
    ({"train_batch_size": 8}, "train_batch_size", "train.tokens_per_step"),
    ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu", "train.micro_batch_rows"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps", "train.tokens_per_step"),
    ({"gradient_clipping": 0.0}, "gradient_clipping", "optimizer.gradient_clipping"),
    ({"optimizer": {"type": "Adam"}}, "optimizer", "optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "optimizer.schedule"),
    ({"fp16": {"enabled": True}}, "fp16", "train.dtype"),
    ({"bf16": {"enabled": False}}, "bf16", "train.dtype"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types", "train.dtype"),
    ({"communication_data_type": "bf16"}, "communication_data_type", "train.dtype"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer", "optimizer"),
    ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer", "optimizer"),
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", "parallel.zero_stage"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "parallel.zero_stage"),
    ({"sequence_parallel_size": 4}, "sequence_parallel_size", "parallel.context"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", "parallel.tensor"),
]


@pytest.mark.parametrize(("deepspeed", "key", "ours"), OURS)
def test_what_another_key_sets_is_refused(deepspeed: dict[str, Any], key: str, ours: str) -> None:
    # Among keys that may be given, and whether or not the two values agree.
    given = {"wall_clock_breakdown": True, **deepspeed}
    with pytest.raises(ConfigError) as caught:
        engine_config(run_config(given), DEGREES)
    assert str(caught.value).startswith(f"deepspeed.{key} is set by {ours}")
    assert str(caught.value).endswith("remove it from the deepspeed section")


def test_further_keys_arrive() -> None:
    given = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
    }
    made = engine_config(run_config(given, zero_stage=2), DEGREES)
    assert made["zero_optimization"] == {"stage": 2, **given["zero_optimization"]}  # type: ignore[dict-item]
    assert made["wall_clock_breakdown"] is True
    assert made["train_micro_batch_size_per_gpu"] == 2


def test_no_key_is_dropped_without_a_word() -> None:
    assert engine_config(run_config({"steps_per_print": 5}), DEGREES)["steps_per_print"] == 5


def test_the_configuration_is_left_as_it_was() -> None:
    config = run_config({"zero_optimization": {"reduce_bucket_size": 1000}})
    assert engine_config(config, DEGREES) == engine_config(config, DEGREES)
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}


@pytest.mark.parametrize("section", [2, None, ["stage"]])
def test_a_zero_section_that_is_none_is_refused(section: object) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization"):
        engine_config(run_config({"zero_optimization": section}), DEGREES)


def test_a_file_counts_like_an_inline_section(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    made = engine_config(run_config(str(path)), DEGREES)
    assert made["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_optimization\.stage is set by parallel\.zero_stage here"):
        engine_config(run_config(str(path)), DEGREES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "deepspeed is the path {path}, which cannot be read: No such file or directory"),
        (b'{"a": 1,}', "{path}, given as deepspeed, is not valid JSON: "),
        (b"", "{path}, given as deepspeed, is not valid JSON: "),
        (b'{"a": "\xff"}', "{path}, given as deepspeed, is not valid JSON: "),
        (b"[1]", "{path}, given as deepspeed, must hold a JSON object"),
    ],
    ids=["missing", "comma", "empty", "no text", "list"],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        engine_config(run_config(str(path)), DEGREES)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)
