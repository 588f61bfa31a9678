"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from farspan.trainer.sections import OptimizerSection


def learning_rate(settings: OptimizerSection, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `steps`.

    Linear warm-up, then: "constant"; "cosine" down to `final_fraction` (SGDR, arXiv:1608.03983); or "wsd", constant
    until the last `decay_fraction` of the steps, which fall linearly to `final_fraction` (arXiv:2404.06395).
    """
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    floor = settings.final_fraction
    if settings.schedule == "constant":
        fraction = 1.0
    elif settings.schedule == "cosine":
        progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        fraction = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay = max(1, round(settings.decay_fraction * steps))
        progress = min(1.0, max(0.0, (step - (steps - decay)) / decay))
        fraction = 1 - (1 - floor) * progress
    return settings.learning_rate * fraction
