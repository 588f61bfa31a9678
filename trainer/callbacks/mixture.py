"""How much of each part of a blend training has seen."""

from __future__ import annotations

from farspan.data.steps import Steps
from farspan.trainer.blended import taken_of_parts
from farspan.trainer.trainer import StepRecord, Trainer


class Mixture:
    """Adds to a step's record the rows and tokens that each part has given so far, and how often it was gone through;
    comes before `Recording`. All are formulas of the step: nothing is counted, and a resumed run goes on with them."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        for name, taken in taken_of_parts(self.steps, record.step).items():
            record.further |= {
                f"blend_rows_{name}": taken.rows,
                f"blend_tokens_{name}": taken.tokens,
                f"blend_epochs_{name}": taken.epochs,
            }
