"""Checkpoints, every so many steps and after the last."""

from __future__ import annotations

from collections.abc import Callable

from farspan.trainer.checkpoint.state import RunState
from farspan.trainer.trainer import StepRecord, Trainer


class Saving:
    def __init__(self, state: RunState, every: int, report: Callable[[str], None]) -> None:
        self.state, self.every, self.report = state, every, report

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step % self.every == 0 or trainer.last_step:
            path = self.state.save(trainer)
            self.report(f"checkpoint saved: {path}")
