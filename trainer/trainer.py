"""The training loop: steps, and callbacks after each."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from farspan.data.batch import Batch
from farspan.parallel.mesh import Mesh
from farspan.trainer.config import RunConfig
from farspan.trainer.engine import Engine
from farspan.trainer.feed import Feed
from farspan.trainer.loss import LossLaw
from farspan.trainer.loss_profile import LossProfile
from farspan.trainer.schedule import learning_rate
from farspan.trainer.stop import StopRequest


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is not a number any more."""


@dataclass
class StepRecord:
    """What is known of a step when it is over; the names are those of `metrics.jsonl`. Steps count from 1.

    `tokens` are those with a label so far, which the loss is of; `tokens_per_second` counts all that were processed.
    """

    step: int
    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    step_seconds: float
    tokens_per_second: float
    sequence_length: int
    context: int
    eval_loss: float | None = None
    further: dict[str, float] = field(default_factory=dict)
    """What was measured besides, by name."""


class Callback(Protocol):
    """One job done after every step, on all ranks, in the order in which callbacks are given."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None: ...


class Trainer:
    """Owns the loop and the two numbers that a resumed run goes on from: the last step and the tokens seen."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, engine: Engine, feed: Feed, callbacks: Sequence[Callback]
    ) -> None:
        self.config, self.mesh, self.engine, self.feed, self.callbacks = config, mesh, engine, feed, callbacks
        self.step = 0
        self.tokens = 0
        self.stopping: str | None = None

    @property
    def last_step(self) -> bool:
        """Whether no step follows: the run is complete, or it was asked to stop."""
        return self.stopping is not None or self.step >= self.config.train.steps

    def train(self, stop: StopRequest) -> None:
        """Runs to the last step, or to the end of the step in which some rank was asked to stop."""
        while not self.last_step:
            record = self._one_step()
            if stop.agree(self.mesh.control):
                self.stopping = stop.signal_name
            for callback in self.callbacks:
                callback.after_step(self, record)

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Mean loss of the held-out rows, and what else was measured there, by name."""
        batches = self.feed.heldout_batches()
        law = self._law(batches)
        self._begin(self.step, training=False)
        self.engine.training(False)
        profile = LossProfile(self.mesh)
        with torch.no_grad():
            total = self._no_loss()
            for batch in batches:
                local_sum, losses = self.engine.forward(self.feed.decoder_input(batch))
                total += local_sum
                profile.add(batch, losses)
        self.engine.training(True)
        sparse = {} if self.feed.sparse is None else self.feed.sparse.of_evaluation(self.mesh)
        return law.mean(total), profile.means() | sparse

    def _one_step(self) -> StepRecord:
        begin = time.perf_counter()
        train = self.config.train
        step = self.step
        batches = self.feed.training_batches(step)
        law = self._law(batches)
        self._begin(step, training=True)
        self.step += 1
        profile = LossProfile(self.mesh) if self.step % train.report_every == 0 else None
        total = self._no_loss()
        for number, batch in enumerate(batches, start=1):
            local_sum, losses = self.engine.forward(self.feed.decoder_input(batch, step))
            self.engine.backward(law.objective(local_sum), last=number == len(batches))
            total += local_sum.detach()
            if profile is not None:
                profile.add(batch, losses)
        if not self.last_step:
            self.feed.look_ahead(self.step)
        rate = learning_rate(self.config.optimizer, self.step, train.steps)
        loss, norm = law.mean(total), self.engine.step(rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            samples = self.feed.steps.samples(step)
            raise NonFiniteError(
                f"step {self.step} has loss {loss} and gradient norm {norm}; its samples are {samples[0]} to "
                f"{samples[-1]}. Nothing of it was saved: the last checkpoint is untouched"
            )
        self.tokens += law.valid_tokens
        seconds = time.perf_counter() - begin
        sharing = self.feed.sharing_of_step(step)
        return StepRecord(
            step=self.step,
            loss=loss,
            tokens=self.tokens,
            grad_norm=norm,
            learning_rate=rate,
            step_seconds=seconds,
            tokens_per_second=train.tokens_per_step / seconds,
            sequence_length=sharing.length,
            context=sharing.mesh.degrees.context,
            further={} if profile is None else profile.means(),
        )

    def _begin(self, step: int, training: bool) -> None:
        if self.feed.sparse is not None:
            self.feed.sparse.begin(step, training)

    def _no_loss(self) -> torch.Tensor:
        """fp64: a sum over millions of tokens."""
        return torch.zeros((), dtype=torch.float64, device=self.mesh.device)

    def _law(self, batches: Sequence[Batch]) -> LossLaw:
        law = LossLaw.of_step(sum(batch.valid for batch in batches), self.mesh.loss, self.mesh.device)
        if law.valid_tokens == 0:
            raise NonFiniteError(
                f"no token after step {self.step} has a label, so that there is no loss: the documents of its rows "
                "have one token each; leave such documents out of data.sources"
            )
        return law
