"""Everything that can be known to be wrong before a process group starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from farspan.data.answers import has_notes
from farspan.data.errors import DataError
from farspan.data.prepared import Prepared, load_prepared
from farspan.kernels.choice import check_backend
from farspan.kernels.problem import capability
from farspan.models.config import ModelConfig
from farspan.parallel.degrees import Degrees, MeshError
from farspan.trainer.arrangement import Arrangement, check_tiles
from farspan.trainer.budgets import Budgets
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.deepspeed_config import engine_config
from farspan.trainer.describe_backends import attention_problem
from farspan.trainer.documents import check_documents
from farspan.trainer.first_rows import RunRows
from farspan.trainer.host_memory import check_host_memory
from farspan.trainer.row_length import degrees_for_rows, for_rows


@dataclass(frozen=True)
class Preflight:
    """What a run is made of, once it is known to be possible."""

    degrees: Degrees
    model: ModelConfig
    prepared: Prepared
    rows: RunRows


def default_processes(config: RunConfig) -> int:
    """`launch.processes`, or one a GPU, or one."""
    return config.launch.processes or max(1, torch.cuda.device_count())


def check(config: RunConfig, processes: int) -> Preflight:
    """ConfigError, in one line that names the key to change, unless the run can start with this many processes."""
    try:
        degrees = Degrees.divide(processes, config.parallel.context, config.parallel.tensor)
        prepared = load_prepared(config.data.directory)
        if config.data.tokenizer is not None:
            prepared.check_tokenizer(config.data.tokenizer)
        check_documents(config, prepared)
    except (MeshError, DataError) as error:
        raise ConfigError(str(error)) from error
    model = with_vocabulary(config, prepared)
    for length in config.row_lengths:
        _check_rows(for_rows(config, length), degrees_for_rows(config, degrees, length))
    _check_sparse_budgets(config)
    for shortage in short_splits(config, prepared):
        raise ConfigError(shortage)
    try:
        rows = RunRows.of(config, prepared)
    except DataError as error:
        raise ConfigError(str(error)) from error
    longest = for_rows(config, config.train.sequence_length)
    if torch.cuda.is_available():
        shared = degrees_for_rows(config, degrees, config.train.sequence_length)
        check_host_memory(longest, shared, check_devices(processes, "launch.processes"))
    elif config.parallel.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel needs CUDA (Megatron's own operators do); set it to false on a CPU"
        )
    elif config.memory.offload:
        raise ConfigError("memory.offload moves tensors from a GPU to its host, and there is no GPU; set it to false")
    elif config.memory.keep_layers == "auto":
        raise ConfigError("memory.keep_layers auto measures a GPU's memory, and there is no GPU; set it to a number")
    try:
        gpu = capability(torch.device("cuda")) if torch.cuda.is_available() else None
        check_backend(attention_problem(longest, gpu), config.attention.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    engine_config(config, degrees)
    return Preflight(degrees, model, prepared, rows)


def check_devices(processes: int, key: str) -> int:
    """Processes on this machine. ConfigError, naming the key to change, when it has GPUs, but fewer."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # torchrun's count for this machine
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes on this machine need as many GPUs, but it has {torch.cuda.device_count()}; change {key}"
        )
    return here


def with_vocabulary(config: RunConfig, prepared: Prepared) -> ModelConfig:
    """The model with the tokenizer's vocabulary where it says none. ConfigError when the two do not go together."""
    size = config.model.vocabulary_size or prepared.vocabulary_size
    if size < prepared.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size {size} is smaller than the tokenizer's {prepared.vocabulary_size} "
            f"({prepared.tokenizer_path}); raise it or prepare the data with another data.tokenizer"
        )
    model = config.model.model_copy(update={"vocabulary_size": size})
    try:
        model.check_tensor_degree(config.parallel.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model


def short_splits(config: RunConfig, prepared: Prepared) -> Iterator[str]:
    """What is wrong with splits that do not fill one row, where rows are cut from one stream."""
    length = config.train.sequence_length
    packed = {
        "train": config.data.method in ("best_fit", "padded"),
        "heldout": has_notes(prepared.directory, "heldout"),
    }
    remedies = {"train": "prepare more text in data.sources", "heldout": "prepare with a larger data.heldout_fraction"}
    for split, tokens in prepared.tokens.items():
        if tokens < length and not packed[split]:
            yield (
                f"train.sequence_length is {length}, but the {split} split has only {tokens} tokens: lower "
                f"train.sequence_length, or {remedies[split]}"
            )


def _check_sparse_budgets(config: RunConfig) -> None:
    if config.attention.sparse is not None and config.attention.sparse.budgets is not None:
        Budgets.read(config.attention.sparse.budgets, config)


def _check_rows(config: RunConfig, degrees: Degrees) -> None:
    """Of one length."""
    train = config.train
    at_once = degrees.data * train.micro_batch_rows
    if train.rows_per_step % at_once:
        raise ConfigError(
            f"train.tokens_per_step {train.tokens_per_step} is {train.rows_per_step} rows of train.sequence_length "
            f"{train.sequence_length}, which data {degrees.data} x train.micro_batch_rows {train.micro_batch_rows} do "
            f"not divide; the nearest train.tokens_per_step that goes is {train.nearest_tokens_per_step(at_once)}"
        )
    arrangement = Arrangement(config, degrees.context)
    try:
        order, _ = arrangement.order(), arrangement.masks()
    except DataError as error:
        raise ConfigError(str(error)) from error
    check_tiles(config, order)
    if config.parallel.sequence_parallel and order.slots * train.micro_batch_rows % degrees.tensor:
        raise ConfigError(
            f"parallel.sequence_parallel divides a context rank's {order.slots * train.micro_batch_rows} tokens by "
            f"parallel.tensor {degrees.tensor}, which does not go; change train.sequence_length"
        )
