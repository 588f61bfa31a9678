"""The weights of a checkpoint without its optimizer, for a mesh with as many tensor ranks as it was saved with."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.config import ModelConfig
from farspan.models.decoder import Decoder
from farspan.models.layers import Sharding
from farspan.parallel.mesh import Mesh
from farspan.trainer.checkpoint.manifest import CheckpointError, Manifest, find_damage, read_manifest
from farspan.trainer.checkpoint.store import CheckpointStore
from farspan.trainer.config import ConfigError, RunConfig

_TENSOR_RANK = re.compile(r"engine/.*mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class Weights:
    """Where a checkpoint's weights are; the files were hashed. `zero_stage` is the one that it was saved at, and
    `tokenizer` the sha256 of the one that its text was encoded with."""

    step: int
    path: Path
    zero_stage: int
    tokenizer: str


def newest_weights(
    directory: Path, model: ModelConfig, tensor: int, report: Callable[[str], None], free: Collection[str] = ()
) -> Weights:
    """Of the newest checkpoint in `directory` whose weights are what was written; `report` is told of damaged ones.

    Nothing is changed on the disk: the run may be training meanwhile. ConfigError when there is none, or when it is of
    another model, in other keys than `free`, or number of tensor ranks.
    """
    for listed in reversed(CheckpointStore(directory, keep=1).list()):
        try:
            manifest = read_manifest(listed.path)
            _check(listed.path, manifest, model, tensor, free)
            problems = [f"{name} {found}" for name, found in _damages(listed.path, manifest) if found]
        except CheckpointError as error:
            problems = [str(error)]
        if not problems:
            identity = manifest.state["identity"]
            return Weights(manifest.step, listed.path, _zero_stage(manifest), identity["data.tokenizer (sha256)"])
        report(f"DAMAGED CHECKPOINT {listed.path}: {'; '.join(problems)}. The one before it is tried.")
    raise ConfigError(f"there is no checkpoint to take weights from in {directory}")


def newest_decoder(
    run: Path, config: RunConfig, model: ModelConfig, mesh: Mesh, report: Callable[[str], None]
) -> Decoder:
    """Collective: a run's decoder with its newest weights, which want no gradient; the first rank looks for them.

    `model` is that of `config`, with its vocabulary known. ConfigError on all ranks when there are none.
    """
    weights = _agree(run, model, mesh, report)
    decoder = Decoder(
        model,
        Sharding(mesh.degrees.tensor, seed=config.run.seed),
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        backend=config.attention.backend,
    ).requires_grad_(False)
    decoder.to(mesh.device, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    load_weights(weights, decoder, mesh)
    report(f"weights of {weights.path}")
    return decoder


def begin_with(run: Path, decoder: Decoder, mesh: Mesh, tokenizer: str, report: Callable[[str], None]) -> None:
    """Collective: a decoder, on its device, takes the newest weights of a run; rotary_theta may be another.

    ConfigError on all ranks when there are none, or when they are of text in the tokens of another tokenizer than this
    one (sha256).
    """
    weights = _agree(run, decoder.config, mesh, report, free=("rotary_theta",))
    if weights.tokenizer != tokenizer:
        raise ConfigError(
            f"run.weights_from {run} was trained with another tokenizer than that of data.directory (sha256 "
            f"{weights.tokenizer[:12]} and {tokenizer[:12]}); set data.tokenizer to its one, and prepare the text again"
        )
    load_weights(weights, decoder, mesh)
    report(f"training begins with the weights of {weights.path}")


def _agree(
    run: Path, model: ModelConfig, mesh: Mesh, report: Callable[[str], None], free: Collection[str] = ()
) -> Weights:
    """The newest weights, which the first rank looks for."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [newest_weights(run / "checkpoints", model, mesh.degrees.tensor, report, free)]
        except ConfigError as error:
            found = [error]
    dist.broadcast_object_list(found, 0, group=mesh.control)
    (weights,) = found
    if isinstance(weights, ConfigError):  # on all ranks: one alone would be taken for a crash of its neighbours
        raise weights
    assert isinstance(weights, Weights)
    return weights


def load_weights(weights: Weights, model: Decoder, mesh: Mesh) -> None:
    """Collective: the first context rank reads, the others get its weights, in the dtype of `model`."""
    state = _read(weights, mesh.tensor_rank) if mesh.context_rank == 0 else {}
    first = dist.get_global_rank(mesh.context, 0)
    for name, parameter in model.named_parameters():
        if mesh.context_rank == 0:
            parameter.data.copy_(state[name])
        dist.broadcast(parameter.data, first, mesh.context)


def _read(weights: Weights, tensor_rank: int) -> Mapping[str, Tensor]:
    if weights.zero_stage < 3:
        file = weights.path / "engine" / f"mp_rank_{tensor_rank:02d}_model_states.pt"
        found: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        return found["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its progress, file by file
        whole: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(weights.path), tag="engine")
    return whole


def _check(path: Path, manifest: Manifest, model: ModelConfig, tensor: int, free: Collection[str]) -> None:
    saved: Mapping[str, Any] = manifest.state["identity"]["model"]
    now = model.model_dump(mode="json", exclude={"preset", *free})
    changes = [f"model.{key} was {saved.get(key)} and is {now[key]}" for key in now if saved.get(key) != now[key]]
    ranks = len({found[1] for name in manifest.files if (found := _TENSOR_RANK.fullmatch(name))})
    if ranks != tensor:
        changes.append(f"parallel.tensor was {ranks} and is {tensor}")
    if changes:
        raise ConfigError(f"{path} has other weights than this configuration: {'; '.join(changes)}; change that back")
    if tensor > 1 and _zero_stage(manifest) == 3:
        raise ConfigError(
            f"{path} was saved at parallel.zero_stage 3 with parallel.tensor {tensor}: its weights are in pieces that "
            "only training puts together; train with parallel.zero_stage 2 or less to use them elsewhere"
        )


def _damages(path: Path, manifest: Manifest) -> list[tuple[str, str | None]]:
    """Of all files that `_read` opens; optimizer state is left alone where weights are whole without it."""
    suffix = ".pt" if _zero_stage(manifest) == 3 else "_model_states.pt"
    names = [name for name in manifest.files if name.startswith("engine/") and name.endswith(suffix)]
    return [(name, find_damage(path / name, manifest.files[name])) for name in names]


def _zero_stage(manifest: Manifest) -> int:
    return int(manifest.state["identity"]["parallel.zero_stage"])
