"""Rows of one length, as the configuration says: how they are packed, blended, and seen through a growing window."""

from __future__ import annotations

from farspan.data.blend import Blend, Part, Stage
from farspan.data.concatenated import ConcatRows
from farspan.data.growing_window import GrowingSteps, GrowingWindow
from farspan.data.methods import Method
from farspan.data.packed import PackedRows
from farspan.data.prepared import Prepared
from farspan.data.rows import RowSource
from farspan.data.steps import Epochs, FixedSteps, SampleStream, Steps
from farspan.trainer.blended import parts_of, taken_of_parts
from farspan.trainer.config import RunConfig
from farspan.trainer.data_config import BlendSection
from farspan.trainer.documents import heldout_documents, training_documents


def packed_steps(config: RunConfig, prepared: Prepared) -> Steps:
    """Those of training, over all ranks. DataError when the text does not do for them."""
    steps = FixedSteps(_stream(config, prepared), config.train.rows_per_step)
    window = config.data.growing_window
    if window is None:
        return steps
    return GrowingSteps(steps, GrowingWindow(window.start, window.steps, window.growth))


def heldout_rows(config: RunConfig, prepared: Prepared) -> RowSource:
    """Of held-out documents, cut from one stream whatever training does, so that runs can be compared; but
    conversations are packed as in training."""
    documents = heldout_documents(config, prepared)
    if documents.told.any():
        return _method(config).rows(documents)[0]
    return ConcatRows(documents, config.train.sequence_length, config.run.seed)


def describe_rows(config: RunConfig, steps: Steps) -> list[str]:
    """How documents are packed, and how often a run goes through each part of a blend; nothing of plain
    concat-and-chunk, or of rows of several lengths that are not blended."""
    taken = taken_of_parts(steps, config.train.steps)
    tokens = sum(part.tokens for part in taken.values())
    lines = [
        f"{name}: {sum(len(part.rows) for part in parts):,} rows, {taken[name].epochs:.2f} epochs in all, "
        f"{taken[name].tokens / tokens:.1%} of the tokens, {_in_words(parts[0].rows)}"
        for name, parts in parts_of(steps).items()
    ]
    fixed = steps.steps if isinstance(steps, GrowingSteps) else steps
    if isinstance(fixed, FixedSteps) and isinstance(fixed.stream, Epochs) and isinstance(fixed.stream.rows, PackedRows):
        lines = [_in_words(fixed.stream.rows)]
    return [f"data.method {config.data.method}: {line}" for line in lines]


def _in_words(rows: RowSource) -> str:
    return rows.in_words if isinstance(rows, PackedRows) else "without padding"


def _stream(config: RunConfig, prepared: Prepared) -> SampleStream:
    documents = training_documents(config, prepared)
    made = {name: _method(config).rows(some) for name, some in documents.items()}
    settings, train, seed = config.data.blend, config.train, config.run.seed
    if settings is None:
        ((rows, _),) = made.values()
        return Epochs(rows, seed)
    parts = {name: Part(*rows, settings.parts[name].epochs) for name, rows in made.items()}
    blend = Blend(parts, _stages(settings, parts, train.rows_per_step), seed)
    blend.check(train.steps * train.rows_per_step)
    return blend


def _method(config: RunConfig) -> Method:
    data = config.data
    assert data.method != "decompose"
    return Method(data.method, config.train.sequence_length, config.run.seed, data.overlong)


def _stages(settings: BlendSection, parts: dict[str, Part], rows_per_step: int) -> list[Stage]:
    if settings.stages:
        return [Stage(stage.steps and stage.steps * rows_per_step, stage.weights) for stage in settings.stages]
    weights = {name: part.weight for name, part in settings.parts.items()}
    natural = {name: part.tokens * (part.epochs or 1.0) for name, part in parts.items()}
    return [Stage(None, {name: natural[name] if given is None else given for name, given in weights.items()})]
