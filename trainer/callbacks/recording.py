"""A row in `metrics.jsonl`, the same in TensorBoard, and one line on the console, after every step; on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from farspan.trainer.metrics import MetricsFile, TensorBoard
from farspan.trainer.progress import Eta, format_line
from farspan.trainer.trainer import StepRecord, Trainer


class Recording:
    """Continues the files of a run after `resumed_step` (0 for a new run): what stands behind it is cut."""

    def __init__(self, directory: Path, resumed_step: int, report: Callable[[str], None] = print) -> None:
        self.metrics = MetricsFile(directory / "metrics.jsonl")
        self.metrics.cut_after(resumed_step)
        self.tensorboard = TensorBoard(directory / "tensorboard", resumed_step + 1)
        self.eta, self.report = Eta(), report

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        known = asdict(record)
        row = {name: value for name, value in (known | known.pop("further")).items() if value is not None}
        self.metrics.append(row)
        self.tensorboard.write(record.step, {name: value for name, value in row.items() if name != "step"})
        self.eta.update(record.step_seconds)
        steps = trainer.config.train.steps
        line = format_line(
            step=record.step,
            steps=steps,
            loss=record.loss,
            grad_norm=record.grad_norm,
            learning_rate=record.learning_rate,
            sequence_length=record.sequence_length,
            tokens_per_second=record.tokens_per_second,
            step_seconds=record.step_seconds,
            remaining_seconds=self.eta.remaining(steps - record.step),
            eval_loss=record.eval_loss,
        )
        self.report(line)

    def close(self) -> None:
        self.metrics.close()
        self.tensorboard.close()
