"""DeepSpeed's configuration, made from ours; further keys may be given, contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farspan.parallel.degrees import Degrees
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.row_length import degrees_for_rows, for_rows

# DeepSpeed's keys that have one of ours. Setting them twice would leave open which one counts.
_OURS = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.tokens_per_step and train.micro_batch_rows",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype",
    "communication_data_type": "train.dtype",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_optimization.stage": "parallel.zero_stage",
    "sequence_parallel_size": "parallel.context",
    "tensor_parallel": "parallel.tensor",
}


def engine_config(config: RunConfig, degrees: Degrees) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`. ConfigError when `deepspeed:` sets what another key of ours sets."""
    extra = _extra(config)
    for key, ours in _OURS.items():
        *sections, last = key.split(".")
        branch: Any = extra
        for section in sections:
            branch = branch.get(section) if isinstance(branch, dict) else None
        if isinstance(branch, dict) and last in branch:
            raise ConfigError(f"deepspeed.{key} is set by {ours} here; remove it from the deepspeed section")
    train = for_rows(config, config.train.sequence_length).train
    degrees = degrees_for_rows(config, degrees, train.sequence_length)
    zero = extra.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization is {zero!r}; it must be a section, or absent")
    made: dict[str, Any] = {
        "train_batch_size": train.rows_per_step * degrees.context,
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": train.rows_per_step // (degrees.data * train.micro_batch_rows),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": config.parallel.zero_stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    if train.dtype == "bf16":
        # Gradients of micro-batches are added up, and summed over ranks, in fp32.
        made |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return {"steps_per_print": 2**31} | extra | made


def _extra(config: RunConfig) -> dict[str, Any]:
    if isinstance(config.deepspeed, dict):
        return dict(config.deepspeed)
    path: Path = config.deepspeed
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"deepspeed is the path {path}, which cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}, given as deepspeed, is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}, given as deepspeed, must hold a JSON object")
    return tree
