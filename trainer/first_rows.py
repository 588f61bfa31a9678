"""Which rows training takes, and the first of them."""

from __future__ import annotations

from farspan.data.batch import StepRows
from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.prepared import Prepared, load_prepared
from farspan.data.rows import Row, Rows, blank_row
from farspan.trainer.config import RunConfig


def step_rows(config: RunConfig, prepared: Prepared, data: int) -> StepRows:
    """The training rows, dealt out to `data` data ranks."""
    train = config.train
    return StepRows(
        rows=Rows(Corpus(prepared, "train"), train.sequence_length, config.run.seed),
        seed=config.run.seed,
        rows_per_step=train.rows_per_step,
        micro_batch_rows=train.micro_batch_rows,
        data=data,
    )


def first_rows(config: RunConfig, data: int) -> tuple[list[Row], str]:
    """Those of the first micro-batch, and what they are; rows with one document each where there is no text yet."""
    length, across = config.train.sequence_length, config.attention.across_documents
    try:
        rows = step_rows(config, load_prepared(config.data.directory), data)
    except DataError as error:
        return [blank_row(length)], f"rows of one document, {length:,} tokens, since there is no text. {error}"
    taken = [rows.row(sample) for sample in rows.samples(0, 0, 0)]
    documents = sum(len(row.cu_seqlens) - 1 for row in taken)
    seen = "seen across documents" if across else "each seen by itself"
    plural = "" if documents == 1 else "s"
    words = f"the first of training: {len(taken)} x {length:,} tokens, {documents} document{plural}, {seen}"
    return taken, words
