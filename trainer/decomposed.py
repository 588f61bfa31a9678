"""The training rows of `data.method: decompose`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from farspan.data.blend import Blend, Part, Stage
from farspan.data.corpus import Corpus
from farspan.data.curriculum import ODDS, Curriculum
from farspan.data.decompose import BucketRows, Decomposition, decompose
from farspan.data.documents import Selection
from farspan.data.prepared import Prepared
from farspan.data.quotas import Quotas
from farspan.data.steps import Epochs, SampleStream
from farspan.trainer.config import RunConfig
from farspan.trainer.documents import training_documents
from farspan.trainer.token_shares import shares_of_stages, tokens_of_text


def decompose_parts(config: RunConfig, prepared: Prepared) -> dict[str, Decomposition]:
    """By the names of a blend's parts; all rows, without a name, where nothing is blended.

    Which rows a document has does not depend on the blend. DataError where a part has no document.
    """
    corpus, documents = Corpus(prepared, "train"), training_documents(config, prepared)
    found = decompose_corpus(config, corpus)
    return {
        name: found.of(some.chosen, corpus.lengths) if isinstance(some, Selection) else found
        for name, some in documents.items()
    }


def decompose_corpus(config: RunConfig, corpus: Corpus) -> Decomposition:
    settings = config.data.decompose
    longest = config.train.sequence_length
    return decompose(corpus.lengths, settings.shortest, longest, settings.randomize, config.run.seed)


def curriculum_steps(config: RunConfig, prepared: Prepared, parts: Mapping[str, Decomposition]) -> Curriculum:
    """Over the lengths that have rows for a step; those of a step come from the parts by their shares of its length.

    DataError where the text does not do, or the epochs of parts do not last for the run.
    """
    train, names, blend = config.train, list(parts), config.data.blend
    text = tokens_of_text(config, parts)
    shares = shares_of_stages(config, names, text)
    odds, corpus = odds_of(config), Corpus(prepared, "train")
    columns = np.flatnonzero(sum(table.sum(0) for table in shares.values()))
    used = [list(odds)[column] for column in columns]
    quotas = Quotas({first: table[:, columns].sum(0).tolist() for first, table in shares.items()}, config.cycle_steps)
    buckets: list[SampleStream] = []
    for place, (length, column) in enumerate(zip(used, columns, strict=True)):
        here = {name: number for number, name in enumerate(names) if text[number, column]}
        rows = {name: BucketRows(corpus, parts[name].places[length], length) for name in here}
        seed = config.run.seed + (length << 32)  # each bucket has an order of its own
        if blend is None:
            buckets.append(Epochs(rows[""], seed))
            continue
        some = {name: Part(of, length * len(of), blend.parts[name].epochs) for name, of in rows.items()}
        weights = {first: {name: table[here[name], column] for name in here} for first, table in shares.items()}
        before = {first: int(quotas.steps_before(first)[place]) * train.tokens_per_step // length for first in shares}
        buckets.append(Blend(some, _stages(weights, before), seed))
    steps = Curriculum(
        buckets,
        quotas,
        [odds[length] for length in used],
        train.tokens_per_step,
        config.curriculum.schedule,
        config.run.seed,
    )
    for bucket, samples in zip(buckets, steps.samples_of_each(train.steps), strict=True):
        if isinstance(bucket, Blend):
            bucket.check(samples)
    return steps


def odds_of(config: RunConfig) -> dict[int, float]:
    """By length, the shortest first."""
    lengths, odds = config.row_lengths[::-1], config.curriculum.odds
    return dict(zip(lengths, ODDS[odds](len(lengths)) if isinstance(odds, str) else odds, strict=True))


def _stages(weights: Mapping[int, Mapping[str, float]], before: Mapping[int, int]) -> list[Stage]:
    """Those in which a bucket has rows, of which the last goes on.

    weights: of parts, by the first cycle of each stage; before: samples of the bucket before that cycle.
    """
    found = [
        Stage(before[stop] - before[first], weights[first])
        for first, stop in zip(weights, [*list(weights)[1:], max(weights)], strict=True)
        if any(weights[first].values())
    ]
    return [*found[:-1], Stage(None, found[-1].weights)]
