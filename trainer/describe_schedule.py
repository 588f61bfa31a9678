"""`farspan data schedule`: which lengths a run's steps have, and what of the text they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farspan.data.blend import Part, Taken
from farspan.data.curriculum import average_context, average_length
from farspan.data.prepared import load_prepared
from farspan.trainer.blended import parts_of, taken_of_parts
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.decomposed import curriculum_steps, decompose_parts
from farspan.trainer.documents import training_documents
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
    prepared, train, settings = load_prepared(config.data.directory), config.train, config.curriculum
    parts, documents = decompose_parts(config, prepared), training_documents(config, prepared).values()
    steps = curriculum_steps(config, prepared, parts)
    lengths = steps.lengths_of_steps(train.steps)
    rows = {length: sum(len(found.places[length]) for found in parts.values()) for length in config.row_lengths}
    text = {length: length * count for length, count in rows.items()}
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
            f"{length:>9,}{rows[length]:>13,}{text[length]:>17,}{text[length] / whole:>9.1%}"
            f"{taken[length] // train.tokens_per_step:>10,}{taken[length] / sum(taken.values()):>10.1%}"
            f"{train.tokens_per_step // length:>13,}{taken[length] / max(1, text[length]):>9.2f}"
            f"{context_of(config, length):>9}" + ("" if length in steps.lengths else "  left out: fewer than a step")
        )
    _report_parts(taken_of_parts(steps, train.steps), parts_of(steps), report)
    discarded = sum(found.discarded_tokens for found in parts.values())
    tokens = sum(int(some.lengths.sum()) for some in documents)
    report(
        f"discarded: {discarded:,} of {tokens:,} tokens ({discarded / tokens:.2%}), with "
        f"{sum(found.discarded_documents for found in parts.values()):,} of "
        f"{sum(len(some.lengths) for some in documents):,} documents that are shorter than data.decompose.shortest "
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


def _report_parts(
    taken: Mapping[str, Taken], parts: Mapping[str, Sequence[Part]], report: Callable[[str], None]
) -> None:
    """A table of the parts of a blend; `parts` are of each length."""
    if not taken:
        return
    width = max(map(len, ("part", *taken)))
    whole = sum(part.tokens for part in taken.values())
    report(
        f"{'part':>{width}}{'rows':>13}{'tokens':>17}{'rows taken':>13}{'tokens taken':>17}{'of run':>9}{'epochs':>9}"
    )
    for name, part in taken.items():
        rows, tokens = sum(len(some.rows) for some in parts[name]), sum(some.tokens for some in parts[name])
        report(
            f"{name:>{width}}{rows:>13,}{tokens:>17,}{part.rows:>13,}{part.tokens:>17,}{part.tokens / whole:>9.1%}"
            f"{part.epochs:>9.2f}"
        )


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
