"""Farspan's side of `step.py`: the trainer, the engine and the feed of `farspan train`, without checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from step_measure import WARM_UP_LENGTH, Split, Stopwatch
from torch import Tensor

from farspan.models.layers import Sharding
from farspan.models.loss import VocabularyLoss
from farspan.parallel import execute
from farspan.parallel.estimate import Estimator
from farspan.parallel.mesh import Mesh
from farspan.trainer.config_file import load_config
from farspan.trainer.engine import Engine
from farspan.trainer.feed import Feed
from farspan.trainer.first_rows import RunRows
from farspan.trainer.preflight import Preflight
from farspan.trainer.stop import StopRequest
from farspan.trainer.train import build_model
from farspan.trainer.trainer import StepRecord, Trainer


class Farspan:
    def __init__(self, path: Path, overrides: list[str], preflight: Preflight, device: torch.device) -> None:
        self.path, self.overrides, self.preflight = path, overrides, preflight
        self.further: dict[str, float] = {}
        self.mesh = Mesh.create(preflight.degrees, device)
        config = load_config(path, overrides)
        with patch.object(Sharding, "normal", _draw_on(device)):
            model = build_model(config, preflight.model, self.mesh)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = Engine(config, self.mesh, model)

    def warm_up(self, length: int) -> None:
        # As many tokens at once as the long row has: what `memory.offload` keeps on the host is then allocated.
        rows = length // WARM_UP_LENGTH
        self.steps(WARM_UP_LENGTH, 2, Stopwatch(self.mesh.device), rows)

    def steps(self, length: int, count: int, stopwatch: Stopwatch, rows: int = 1) -> float:
        row = [f"train.sequence_length={length}", f"train.tokens_per_step={rows * length}", f"train.steps={count}"]
        row.append(f"train.micro_batch_rows={rows}")
        config = load_config(self.path, self.overrides + row)
        rows_of_run = RunRows.of(config, self.preflight.prepared)
        feed = Feed(config, self.preflight.model, rows_of_run, self.mesh)
        laps = _Laps(stopwatch)
        trainer = Trainer(config, self.mesh, self.engine, feed, [laps])
        with StopRequest() as stop:
            stopwatch.start()
            trainer.train(stop)
        if feed.sparse is not None:
            densities = [selected.index.density().mean() for selected in feed.sparse.newest.values()]
            self.further = {"density": float(torch.stack(densities).mean())}
        return laps.loss

    def watch(self, split: Split) -> None:
        split.call(Estimator, "__call__", "index")
        split.call(execute, "attend", "attention")
        split.call(execute, "attend_backward", "attention")
        split.forward_and_backward(VocabularyLoss, "forward", "loss")
        split.call(self.engine, "step", "optimizer")


class _Laps:
    """A callback of the trainer."""

    loss = float("nan")

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.stopwatch.lap()
        self.loss = record.loss


def _draw_on(device: torch.device) -> Callable[..., Callable[[Tensor], Tensor]]:
    """Initial weights drawn on the GPU: a CPU takes a minute for three billion of them."""

    def normal(sharding: Sharding, name: str, std: float) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight.copy_(torch.empty_like(weight, device=device).normal_(0, std))

    return normal
