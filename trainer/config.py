"""The configuration of a run: its sections, and what follows from several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from farspan.models.config import ModelConfig
from farspan.trainer.attention_config import AttentionSection
from farspan.trainer.config_checks import CHECKS
from farspan.trainer.data_config import CurriculumSection, DataSection
from farspan.trainer.section import Section
from farspan.trainer.sections import (
    CheckpointSection,
    EvalSection,
    LaunchSection,
    MemorySection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    TrainSection,
)


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key to change."""


class RunConfig(Section):
    """The whole configuration of a run."""

    run: RunSection
    launch: LaunchSection = LaunchSection()  # type: ignore[call-arg]
    model: ModelConfig
    data: DataSection
    train: TrainSection
    curriculum: CurriculumSection = CurriculumSection()  # type: ignore[call-arg]
    parallel: ParallelSection = ParallelSection()  # type: ignore[call-arg]
    attention: AttentionSection = AttentionSection()
    memory: MemorySection = MemorySection()
    optimizer: OptimizerSection = OptimizerSection()  # type: ignore[call-arg]
    eval: EvalSection = EvalSection()  # type: ignore[call-arg]
    checkpoint: CheckpointSection = CheckpointSection()  # type: ignore[call-arg]
    cluster: str = "h200"
    """The machines, for predictions and for `parallel.plan: auto`: a name in configs/clusters, or a .yaml's path."""
    deepspeed: dict[str, Any] | Path = Field(default_factory=dict)
    """Further keys of a DeepSpeed configuration, inline or as the path of a JSON file; none that is set elsewhere."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for check in CHECKS:
            check(self)
        return self

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of the rows that training takes, the longest first."""
        longest = self.train.sequence_length
        if self.data.method != "decompose":
            return (longest,)
        return tuple(longest >> i for i in range((longest // self.data.decompose.shortest).bit_length()))

    @property
    def cycle_steps(self) -> int:
        """Steps of each cycle of the curriculum."""
        return self.train.steps // self.curriculum.cycles
