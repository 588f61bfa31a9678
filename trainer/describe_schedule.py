"""`farspan data schedule`: which lengths a run's steps have, and what of the text they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farspan.data.corpus import Corpus
from farspan.data.curriculum import average_context, average_length
from farspan.data.prepared import load_prepared
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.decomposed import curriculum_steps, decompose_corpus
from farspan.trainer.plan_plot import check_plot
from farspan.trainer.row_length import context_of

_PARTS = 10


def describe_schedule(config: RunConfig, report: Callable[[str], None], plot: Path | None = None) -> None:
    """A table by length, the mean length over the run, and what is discarded.

    ConfigError where all rows have one length, or when `plot` is given and cannot be drawn.
    """
    if config.data.method != "decompose":
        raise ConfigError(
            f"data.method {config.data.method} makes rows of one length, train.sequence_length "
            f"{config.train.sequence_length}, so that there is no schedule of lengths; set data.method to decompose"
        )
    if plot is not None:
        check_plot(plot)
    corpus = Corpus(load_prepared(config.data.directory), "train")
    found, train, settings = decompose_corpus(config, corpus), config.train, config.curriculum
    steps = curriculum_steps(config, corpus, found)
    lengths = steps.lengths_of_steps(train.steps)
    text = {length: length * len(places) for length, places in found.places.items()}
    taken = {length: int((lengths == length).sum()) * train.tokens_per_step for length in text}
    whole = sum(text.values())

    report(
        f"{train.steps:,} steps of {train.tokens_per_step:,} tokens in {settings.cycles} "
        f"cycle{'' if settings.cycles == 1 else 's'}, odds {settings.odds}, mixture {settings.mixture}, "
        f"schedule {settings.schedule}"
    )
    report(
        f"{'length':>9}{'rows':>13}{'tokens':>17}{'of text':>9}{'steps':>10}{'of steps':>10}{'rows a step':>13}"
        f"{'epochs':>9}{'context':>9}"
    )
    for length in text:
        report(
            f"{length:>9,}{len(found.places[length]):>13,}{text[length]:>17,}{text[length] / whole:>9.1%}"
            f"{taken[length] // train.tokens_per_step:>10,}{taken[length] / sum(taken.values()):>10.1%}"
            f"{train.tokens_per_step // length:>13,}{taken[length] / max(1, text[length]):>9.2f}"
            f"{context_of(config, length):>9}" + ("" if length in steps.lengths else "  left out: fewer than a step")
        )
    report(
        f"discarded: {found.discarded_tokens:,} of {int(corpus.lengths.sum()):,} tokens "
        f"({found.discarded_tokens / corpus.lengths.sum():.2%}), with {found.discarded_documents:,} of "
        f"{len(corpus.lengths):,} documents that are shorter than data.decompose.shortest "
        f"{config.data.decompose.shortest}"
    )
    report(
        f"rows of the run have {average_length(taken):,.0f} tokens on average, and their tokens "
        f"{average_context(taken):,.0f} before them"
    )
    report(f"mean length of steps by tenths of the run: {_by_parts(lengths)}")
    if plot is not None:
        plot_schedule(lengths, {length: (text[length], taken[length]) for length in text}, plot)
        report(f"plot: {plot}")


def _by_parts(lengths: NDArray[np.int64]) -> str:
    parts = np.array_split(lengths, min(_PARTS, len(lengths)))
    return ", ".join(f"{part.mean():,.0f}" for part in parts)


def plot_schedule(lengths: NDArray[np.int64], tokens: dict[int, tuple[int, int]], path: Path) -> None:
    """The length of each step; and tokens by length, of the text and of the run. ConfigError when it cannot be written.

    `tokens` are pairs of these two by length.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_step, by_length = figure.subplots(1, 2, width_ratios=(2, 1))
    by_step.scatter(np.arange(1, len(lengths) + 1), lengths, s=8, linewidths=0)
    by_step.set_yscale("log", base=2)
    by_step.set(title="length of each step's rows", xlabel="step", ylabel="tokens of a row")
    shortest_first = sorted(tokens)
    places = np.arange(len(shortest_first))
    for number, name in enumerate(("text", "run")):
        values = [tokens[length][number] for length in shortest_first]
        by_length.bar(places + 0.4 * number - 0.2, values, 0.4, label=name)
    by_length.set(title="tokens by length", xlabel="tokens of a row", ylabel="tokens")
    by_length.set_xticks(places, [f"{length:,}" for length in shortest_first], rotation=45)
    by_length.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}") from error
