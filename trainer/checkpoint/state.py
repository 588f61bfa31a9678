"""What a checkpoint holds: the engine's state, every rank's random numbers, and where the run stands."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farspan.data.prepared import Prepared
from farspan.models.config import ModelConfig
from farspan.parallel.degrees import Degrees
from farspan.trainer.checkpoint.store import CheckpointStore, Found
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.decomposed import odds_of
from farspan.trainer.trainer import Trainer


class RunState:
    """Saves a trainer to a store, and puts back what was saved: on the same layout bit for bit, on one with another
    number of data x context ranks as the same numbers, differently divided."""

    def __init__(
        self, store: CheckpointStore, config: RunConfig, model: ModelConfig, degrees: Degrees, prepared: Prepared
    ) -> None:
        self.store, self.config, self.degrees = store, config, degrees
        # What must be the same for a resumed run to go on, but for the data and context degrees of the layout; the rest
        # of the configuration may change.
        self.identity = {
            "layout": str(degrees),
            "parallel.zero_stage": config.parallel.zero_stage,
            "train.dtype": config.train.dtype,
            "model": model.model_dump(mode="json", exclude={"preset"}),
            **_samples_identity(config, prepared),
        }

    def save(self, trainer: Trainer) -> Path:
        """Collective."""
        rank = torch.distributed.get_rank()

        def write(directory: Path) -> None:
            trainer.engine.save(str(directory))
            torch.save(_random_state(), directory / f"random_{rank:05d}.pt")

        state = {
            "tokens": trainer.tokens,
            "identity": self.identity,
            "torch": str(torch.__version__),
        }
        return self.store.save(trainer.step, write, state, trainer.mesh.control)

    def check(self, found: Found) -> None:
        """ConfigError when the checkpoint is of another tensor degree, ZeRO stage, model or order of samples, or of a
        later step than the last one."""
        saved, now = _by_key(found.state["identity"]), _by_key(self.identity)
        changes = [
            f"{key} was {saved.get(key)} and is {now.get(key)}"
            for key in dict.fromkeys([*now, *saved])
            if saved.get(key) != now.get(key)
        ]
        if changes:
            raise ConfigError(
                f"{found.path} cannot be resumed with this configuration: {'; '.join(changes)}; "
                "change that back, or choose another run.dir"
            )
        if found.step > self.config.train.steps:
            raise ConfigError(
                f"train.steps is {self.config.train.steps}, but the run is at step {found.step} ({found.path}); raise "
                "it, or choose another run.dir"
            )

    def resume(self, trainer: Trainer, found: Found, report: Callable[[str], None]) -> None:
        """Collective; the checkpoint must have passed `check`."""
        was = Degrees.parse(found.state["identity"]["layout"])
        trainer.engine.load(str(found.path), was.shard)
        # Of as many ranks each has its own; of more, those of the same tensor rank draw alike, as they do at the start.
        rank = torch.distributed.get_rank() % was.world
        _set_random_state(torch.load(found.path / f"random_{rank:05d}.pt", weights_only=False))
        trainer.step, trainer.tokens = found.step, int(found.state["tokens"])
        report(f"resumed from {found.path} at step {found.step}")
        if was != self.degrees:
            report(
                f"layout was {was} and is {self.degrees}: the same state on other ranks, losses go on up to rounding"
            )


def _samples_identity(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """All that the order of samples is a function of. How many ranks take them, and hold a row, is not among it."""
    data, train = config.data, config.train
    found: dict[str, Any] = {
        "data (fingerprint)": prepared.fingerprint,
        "data.tokenizer (sha256)": prepared.tokenizer_digest,
        "run.seed": config.run.seed,
        "train.tokens_per_step": train.tokens_per_step,
        "train.sequence_length": train.sequence_length,
        "data.method": data.method,
    }
    if data.method in ("best_fit", "padded"):
        found["data.overlong"] = data.overlong
    if data.blend is not None:
        parts = data.blend.parts
        found["data.blend.parts (in order)"] = list(parts)  # each one's seed is that of its place
        found |= {f"data.blend.parts.{name}": part.model_dump() for name, part in parts.items()}
        stages = [stage.model_dump() for stage in data.blend.stages]
        # A run may become longer, and its last stage with it.
        found["data.blend.stages"] = [*stages[:-1], *({**stage, "steps": None} for stage in stages[-1:])]
    if data.method == "decompose":
        found |= {f"data.decompose.{key}": value for key, value in data.decompose.model_dump().items()}
        found |= {
            "curriculum.odds": list(odds_of(config).values()),
            "curriculum.mixture": config.curriculum.mixture,
            "curriculum.schedule": config.curriculum.schedule,
            "train.steps / curriculum.cycles": config.cycle_steps,
        }
    return found


def _by_key(identity: dict[str, Any]) -> dict[str, Any]:
    """Keys of the configuration with what they are, so that a message names the one that differs."""
    others = {key: value for key, value in identity.items() if key not in ("layout", "model")}
    model = {f"model.{key}": value for key, value in identity["model"].items()}
    return {"parallel.tensor": Degrees.parse(identity["layout"]).tensor, **others, **model}


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
