"""What depends on the length of rows: how many ranks share one, and how many a data rank takes at once."""

from __future__ import annotations

from farspan.parallel.degrees import Degrees
from farspan.trainer.config import RunConfig


def context_of(config: RunConfig, length: int) -> int:
    """Ranks that share a row of `length` tokens: with `parallel.tokens_per_rank` as few as can hold it."""
    held, most = config.parallel.tokens_per_rank, config.parallel.context
    if held is None:
        return most
    return min(most, 1 << (-(-length // held) - 1).bit_length())


def narrower_contexts(config: RunConfig) -> list[int]:
    """The degrees below `parallel.context` that rows of some length have, the largest first."""
    found = {context_of(config, length) for length in config.row_lengths}
    return sorted(found - {config.parallel.context}, reverse=True)


def for_rows(config: RunConfig, length: int) -> RunConfig:
    """The configuration of a run that has rows of this length alone, with as many tokens in a micro-batch of a rank.

    A step then has equally many micro-batches whatever its rows, and all that is computed of a configuration (plans,
    memory, time) is computed for these rows.
    """
    train, parallel = config.train, config.parallel
    context, longest = context_of(config, length), train.sequence_length
    rows = train.micro_batch_rows * longest * context // (context_of(config, longest) * length)
    ulysses = parallel.ulysses and min(parallel.ulysses, context)
    inner = parallel.inner and min(parallel.inner, context // (ulysses or 1))
    return config.model_copy(
        update={
            "train": train.model_copy(update={"sequence_length": length, "micro_batch_rows": rows}),
            "parallel": parallel.model_copy(update={"context": context, "inner": inner, "ulysses": ulysses}),
        }
    )


def degrees_for_rows(config: RunConfig, degrees: Degrees, length: int) -> Degrees:
    """Those of the mesh's ranks for rows of this length; weights and optimizer are shared by as many ranks always."""
    return degrees.with_context(context_of(config, length))
