"""Which rows a run takes, and the first of them."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.data.errors import TooLittleTextError
from farspan.data.growing_window import GrowingSteps
from farspan.data.prepared import Prepared, load_prepared
from farspan.data.rows import Row, RowSource
from farspan.data.steps import Steps
from farspan.trainer.arrangement import row_without_text
from farspan.trainer.config import RunConfig
from farspan.trainer.decomposed import curriculum_steps, decompose_parts
from farspan.trainer.packing import heldout_rows, packed_steps


@dataclass(frozen=True)
class RunRows:
    """All rows of a run. To lay them out takes seconds where there are millions of documents.

    steps: those of training, over all ranks. heldout: those of evaluation.
    """

    steps: Steps
    heldout: RowSource

    @classmethod
    def of(cls, config: RunConfig, prepared: Prepared) -> RunRows:
        """DataError when the text does not do for the configuration."""
        return cls(training_steps(config, prepared), heldout_rows(config, prepared))


def training_steps(config: RunConfig, prepared: Prepared) -> Steps:
    """The training rows of every step, over all ranks."""
    if config.data.method == "decompose":
        return curriculum_steps(config, prepared, decompose_parts(config, prepared))
    return packed_steps(config, prepared)


def whole_rows(steps: Steps, count: int) -> list[Row]:
    """The first of training, by which a plan for a whole run is chosen: as they are when a growing window has grown."""
    grown = steps.steps if isinstance(steps, GrowingSteps) else steps
    return [grown.row(sample) for sample in grown.samples(0)[:count]]


def first_rows(config: RunConfig) -> tuple[list[Row], str]:
    """Those of the first micro-batch, and what they are; rows with one document each where there is no text for any.

    DataError where there is, and it is damaged or does not do for the configuration.
    """
    length, across = config.train.sequence_length, config.attention.across_documents
    if config.data.method == "decompose":
        return [row_without_text(config)], f"rows of one document, {length:,} tokens, as all of data.method decompose"
    try:
        steps = training_steps(config, load_prepared(config.data.directory))
    except TooLittleTextError as error:
        words = f"rows of one document, {length:,} tokens, since there is no text for them. {error}"
        return [row_without_text(config)], words
    taken = whole_rows(steps, config.train.micro_batch_rows)
    documents = sum(len(row.cu_seqlens) - 1 for row in taken)
    seen = "seen across documents" if across else "each seen by itself"
    plural = "" if documents == 1 else "s"
    words = f"the first of training: {len(taken)} x {length:,} tokens, {documents} document{plural}, {seen}"
    return taken, words
