"""How much of each part of a blend training has seen."""

from __future__ import annotations

from farspan.data.blend import Blend
from farspan.trainer.trainer import StepRecord, Trainer


class Mixture:
    """Adds to a step's record the rows that each part has given so far, and how often it was gone through; comes before
    `Recording`. Both are formulas of the step, so that nothing is counted and a resumed run goes on with them."""

    def __init__(self, blend: Blend, rows_per_step: int) -> None:
        self.blend, self.rows_per_step = blend, rows_per_step

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        samples = record.step * self.rows_per_step
        record.further |= {f"blend_rows_{name}": count for name, count in self.blend.counts(samples).items()}
        record.further |= {f"blend_epochs_{name}": share for name, share in self.blend.epochs(samples).items()}
