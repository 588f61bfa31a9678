"""How long the documents of prepared data are, and into which rows decomposition would cut them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from farspan.data.decompose import Decomposition, decompose
from farspan.data.histogram import Histogram

_SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def describe_lengths(
    all_lengths: NDArray[np.int64], chosen: slice, shortest: int, longest: int, randomize: bool, seed: int
) -> Iterator[str]:
    """Lines on some of the documents of a split, which have `all_lengths` tokens [documents]: a histogram, quantiles,
    and a table of the buckets from `shortest` to `longest` tokens, both powers of two, as `decompose` fills them."""
    lengths = all_lengths[chosen]
    if not len(lengths):
        yield "no documents"
        return
    yield from Histogram.of(lengths).lines()
    yield ""
    yield f"{'share':>8} {'of documents up to':>20} {'of tokens in documents up to':>30}"
    for share, of_documents, of_tokens in _quantiles(lengths):
        yield f"{share:>8.0%} {of_documents:>20,} {of_tokens:>30,}"
    yield ""
    # Of the whole split: a document draws by its number there.
    cut = decompose(all_lengths, shortest, longest, randomize, seed).of(
        np.arange(len(all_lengths))[chosen], all_lengths
    )
    yield from _buckets(cut, int(lengths.sum()), shortest)


def _quantiles(lengths: NDArray[np.int64]) -> Iterator[tuple[float, int, int]]:
    """For each share: the length that so many of the documents do not exceed, and that of which so many tokens are."""
    ordered = np.sort(lengths)
    tokens = np.cumsum(ordered)
    for share in _SHARES:
        of_documents = ordered[max(0, int(np.ceil(share * len(ordered))) - 1)]
        of_tokens = ordered[int(np.searchsorted(tokens, share * tokens[-1]))]
        yield share, int(of_documents), int(of_tokens)


def _buckets(cut: Decomposition, total: int, shortest: int) -> Iterator[str]:
    yield f"{'bucket':>12} {'sequences':>12} {'tokens':>16} {'share':>7}"
    for length, places in sorted(cut.places.items()):
        tokens = length * len(places)
        yield f"{length:>12,} {len(places):>12,} {tokens:>16,} {tokens / total:>7.1%}"
    yield (
        f"{'discarded':>12} {'':>12} {cut.discarded_tokens:>16,} {cut.discarded_tokens / total:>7.1%}   "
        f"(with {cut.discarded_documents:,} documents of less than {shortest + 1:,} tokens)"
    )
