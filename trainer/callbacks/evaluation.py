"""Held-out loss, also by length and position, and what was selected, every so many steps and after the last."""

from __future__ import annotations

from farspan.trainer.trainer import StepRecord, Trainer


class Evaluation:
    def __init__(self, every: int) -> None:
        self.every = every

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        due = self.every and record.step % self.every == 0
        if due or record.step == trainer.config.train.steps:
            record.eval_loss, further = trainer.evaluate()
            record.further |= {f"eval_{name}": value for name, value in further.items()}
