"""`farspan data compare`: what each way of making rows would do to the documents of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from farspan.data.composition import Composition, measure, measure_decomposition, table, windowed_context
from farspan.data.corpus import Corpus
from farspan.data.decompose import decompose
from farspan.data.growing_window import GrowingWindow
from farspan.data.methods import Method
from farspan.data.prepared import load_prepared
from farspan.trainer.config import RunConfig

_MOMENTS = 4


def compare(config: RunConfig, report: Callable[[str], None]) -> None:
    """A table of all methods for rows of `train.sequence_length`, with a legend. DataError when there is no text."""
    data, length, seed = config.data, config.train.sequence_length, config.run.seed
    lengths = Corpus(load_prepared(data.directory), "train").lengths
    concat = Method("concat", length, seed, data.overlong)
    stream = concat.layout(lengths)
    found: dict[str, Composition] = {}
    if len(stream):
        found["concat"] = measure(stream, lengths)
        found["concat, across documents"] = measure(stream, lengths, across_documents=True)
    for name in ("best_fit", "padded"):
        found[f"{name}, {data.overlong}"] = measure(replace(concat, name=name).layout(lengths), lengths)
    if length & (length - 1) == 0 and data.decompose.shortest <= length:
        cut = decompose(lengths, data.decompose.shortest, length, data.decompose.randomize, seed)
        found["decompose"] = measure_decomposition(cut, lengths)
    report(f"{len(lengths):,} documents of {int(lengths.sum()):,} tokens, rows of {length:,}")
    for line in table(found):
        report(line)
    if data.growing_window is not None and len(stream):
        window = GrowingWindow(data.growing_window.start, data.growing_window.steps, data.growing_window.growth)
        steps = [window.steps * moment // _MOMENTS for moment in range(_MOMENTS + 1)]
        widths = {step: window.width(step, length) for step in steps}
        context = [f"{step:,}: {windowed_context(stream, width):,.0f}" for step, width in widths.items()]
        report(f"mean context of concat with data.growing_window, by step: {', '.join(context)}")
    report(
        "padding: of the tokens of rows; cut: documents that no row holds as a whole; lost: tokens in no row; joined: "
        "parts of documents that have a row in common with others; mean length: of such parts; mean context: tokens "
        "before a token that it sees"
    )
