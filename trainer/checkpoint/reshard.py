"""Loads a checkpoint that another number of data x context ranks wrote: its optimizer state is divided anew.

Nothing is written. Every rank maps the old shards into memory and copies the elements that are its own now, so that it
needs no memory beyond its own shard, and reads from the disk only what it copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.trainer.checkpoint.shards import Run, ShardError, Shards
from farspan.trainer.config import ConfigError


@dataclass(frozen=True)
class State:
    """Of one rank: flat tensors of fp32 weights, and the optimizer's state of each."""

    weights: Sequence[Tensor]
    optimizer: Sequence[Mapping[str, Tensor]]


class SavedShards:
    """The files of one tensor rank in `directory`, each opened when it is first asked for."""

    def __init__(self, directory: Path, tensor_rank: int, zero_stage: int) -> None:
        self._directory, self._tensor_rank, self._zero_stage = directory, tensor_rank, zero_stage
        self.state = cache(self._state)

    def model(self) -> dict[str, Any]:
        """What stands beside the optimizer's state: `param_shapes` and the engine's counters."""
        prefix = "zero_pp_rank_0_" if self._zero_stage == 3 else ""
        return self._open(f"{prefix}mp_rank_{self._tensor_rank:02d}_model_states.pt")

    def _state(self, rank: int) -> State:
        found = self._open(f"*zero_pp_rank_{rank}_mp_rank_{self._tensor_rank:02d}_optim_states.pt")
        shard = found["optimizer_state_dict"]
        _require_no_gaps(shard)
        weights, optimizer = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if self._zero_stage == 3
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        states = shard[optimizer]["state"]
        return State(shard[weights], [states[flat] for flat in range(len(shard[weights]))])

    def _open(self, pattern: str) -> dict[str, Any]:
        files = list(self._directory.glob(pattern))
        if len(files) != 1:
            raise ConfigError(
                f"{self._directory} has {len(files)} files {pattern} where one is expected, so that its state cannot "
                "be divided anew; set launch.processes to start as many ranks as wrote it"
            )
        (file,) = files
        found: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        return found


def load_divided_anew(engine: Any, directory: Path, tensor_rank: int, zero_stage: int, ranks: int) -> None:
    """Collective: DeepSpeed's `engine` takes the state that `ranks` data x context ranks saved in `directory`.

    ZeRO stage, 1 or more, and tensor degree are those that it was saved with. ConfigError, on all ranks, when DeepSpeed
    was told to lay the state out in a way that cannot be divided anew.
    """
    saved = SavedShards(directory, tensor_rank, zero_stage)
    model = saved.model()
    optimizer, group = engine.optimizer, engine.optimizer.dp_process_group
    _require_no_gaps(optimizer.state_dict())
    flats = _flats(optimizer, zero_stage)
    was = Shards(parameter_groups(model["param_shapes"]), _sizes(saved.state(0)), ranks, zero_stage)
    shapes, sizes = engine._get_zero_param_shapes(), [flat.numel() for flat in flats]
    now = Shards(parameter_groups(shapes), sizes, group.size(), zero_stage)
    if zero_stage < 3:
        engine.load_checkpoint(str(directory.parent), tag=directory.name, load_optimizer_states=False)
    else:  # its weights are those of the shards
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, model[counter])
    try:
        states = _divide(saved, was, now, group.rank(), flats)
    except ShardError as error:
        raise ConfigError(
            f"{directory} was written by {ranks} data x context ranks, and its optimizer state cannot be divided anew "
            f"over {group.size()} ({error}); set launch.processes to start as many as then, or remove what changes the "
            "layout from deepspeed.zero_optimization"
        ) from error
    optimizer.state.update(zip(flats, states))
    # Its own state through itself: this is what sets weights from their fp32 masters, and whatever else hangs on them.
    optimizer.load_state_dict([optimizer.state_dict()] * group.size(), load_from_fp32_weights=True)


def _divide(
    saved: SavedShards, was: Shards, now: Shards, rank: int, flats: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """Fills the fp32 weights of `rank` and returns the optimizer's state for each of its flat tensors."""
    states = [
        {
            key: torch.zeros_like(flat, dtype=value.dtype, requires_grad=False) if value.dim() else value.clone()
            for key, value in saved.state(0).optimizer[0].items()
        }
        for flat in flats
    ]
    for target, source, old_rank in _overlaps(was, now, rank):
        old = saved.state(old_rank)
        flats[target.flat].data[_places(target)].copy_(old.weights[source.flat][_places(source)])
        for key, value in old.optimizer[source.flat].items():
            if value.dim():
                states[target.flat][key][_places(target)].copy_(value[_places(source)])
    return states


def _overlaps(was: Shards, now: Shards, rank: int) -> Iterator[tuple[Run, Run, int]]:
    """What of the new shard of `rank` lies where in the old one of which rank: the same elements in both runs."""
    held: dict[str, list[tuple[int, Run]]] = {}
    for old_rank in range(was.ranks):
        for run in was.runs(old_rank):
            held.setdefault(run.name, []).append((old_rank, run))
    for run in now.runs(rank):
        for old_rank, old in held[run.name]:
            start, stop = max(run.start, old.start), min(run.start + run.count, old.start + old.count)
            if start < stop:
                yield _part(run, start, stop), _part(old, start, stop), old_rank


def _part(run: Run, start: int, stop: int) -> Run:
    return Run(run.name, start, stop - start, run.flat, run.offset + start - run.start)


def _places(run: Run) -> slice:
    return slice(run.offset, run.offset + run.count)


def parameter_groups(shapes: Sequence[Mapping[str, torch.Size]]) -> list[dict[str, int]]:
    """Elements by name from what DeepSpeed calls `param_shapes`, in the order in which it lays parameters out."""
    return [{name: shape.numel() for name, shape in group.items()} for group in shapes]


def _flats(optimizer: Any, zero_stage: int) -> list[Tensor]:
    """The live fp32 weights of this rank's shard, padding included."""
    if zero_stage == 3:
        return list(optimizer.state_dict()["fp32_flat_groups"])
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def _sizes(state: State) -> list[int]:
    """Saved weights may lack their padding; what the optimizer keeps of them does not."""
    return [next(value.numel() for value in each.values() if value.dim()) for each in state.optimizer]


def _require_no_gaps(shard: Mapping[str, Any]) -> None:
    """Where parameters lie in a shard follows from their sizes alone, and it holds its padding."""
    if isinstance(shard.get("base_optimizer_state"), list):
        raise ConfigError(
            "deepspeed.zero_optimization.elastic_checkpoint lays optimizer state out in a way that is not divided anew "
            "here; leave it out, and start as many ranks as wrote the checkpoint"
        )
    if any(any(gaps) for gaps in shard.get("param_alignment_paddings", ())):
        raise ConfigError(
            "deepspeed.zero_optimization.parameter_alignment lays optimizer state out in a way that cannot be divided "
            "over another number of ranks; set launch.processes to start as many as wrote the checkpoint"
        )
