"""The training rows of `data.method: decompose`."""

from __future__ import annotations

from farspan.data.corpus import Corpus
from farspan.data.curriculum import ODDS, Curriculum
from farspan.data.decompose import BucketRows, Decomposition, decompose
from farspan.data.errors import DataError
from farspan.data.steps import Epochs
from farspan.trainer.config import RunConfig


def decompose_corpus(config: RunConfig, corpus: Corpus) -> Decomposition:
    settings = config.data.decompose
    longest = config.train.sequence_length
    return decompose(corpus.lengths, settings.shortest, longest, settings.randomize, config.run.seed)


def rows_of_step(config: RunConfig, length: int) -> int:
    return config.train.tokens_per_step // length


def curriculum_steps(config: RunConfig, corpus: Corpus, found: Decomposition) -> Curriculum:
    """Over the lengths that have rows for a step. DataError when the longest has not."""
    longest, seed, settings = config.train.sequence_length, config.run.seed, config.curriculum
    count, needed = len(found.places[longest]), rows_of_step(config, longest)
    if count < needed:
        raise DataError(
            f"the text has {count} rows of train.sequence_length {longest}, and a step takes {needed}: lower "
            "train.sequence_length or train.tokens_per_step, or prepare more text in data.sources."
        )
    odds, mixture = odds_of(config), mixture_of(config, found)
    lengths = [length for length in odds if len(found.places[length]) >= rows_of_step(config, length)]
    return Curriculum(
        # Each bucket has an order of its own.
        [Epochs(BucketRows(corpus, found.places[length], length), seed + (length << 32)) for length in lengths],
        [mixture[length] for length in lengths],
        [odds[length] for length in lengths],
        config.train.tokens_per_step,
        config.train.steps // settings.cycles,
        settings.schedule,
        seed,
    )


def odds_of(config: RunConfig) -> dict[int, float]:
    """By length, the shortest first."""
    lengths, odds = config.row_lengths[::-1], config.curriculum.odds
    return dict(zip(lengths, ODDS[odds](len(lengths)) if isinstance(odds, str) else odds, strict=True))


def mixture_of(config: RunConfig, found: Decomposition) -> dict[int, float]:
    """Shares of tokens by length, the shortest first."""
    lengths, mixture = config.row_lengths[::-1], config.curriculum.mixture
    if mixture == "natural":
        return {length: float(length * len(found.places[length])) for length in lengths}
    return dict.fromkeys(lengths, 1.0) if mixture == "equal" else dict(zip(lengths, mixture, strict=True))
