"""Dataset decomposition: documents cut into rows whose lengths are powers of two, each from one document.

Pouransari et al., "Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum", 2024
(arXiv:2405.13226). A row of the bucket 2^k has 2^k tokens, and its last label is the token behind them, with which the
next row of the document begins: no token but a document's first is without a prediction. Nothing is copied: a row is
where it starts in which document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farspan.data.corpus import Corpus
from farspan.data.rows import Row
from farspan.data.sampling import random_words

_DRAWN_AT_ONCE = 64  # buckets of each document that is longer than two of the largest rows
_DOCUMENTS_AT_ONCE = 1 << 14


class Draws(Protocol):
    """Numbers from [0, 1), such as those of `numpy.random.Generator`."""

    def random(self) -> float: ...


class DocumentDraws:
    """Those of one document of a corpus: a function of the seed and the document's number alone."""

    def __init__(self, seed: int, document: int) -> None:
        self._seed, self._document, self._drawn = seed, np.array([document]), 0

    def random(self) -> float:
        word = random_words(self._seed, self._document, np.array([self._drawn]))
        self._drawn += 1
        return float(_fractions(word)[0])


def decompose_document(
    length: int,
    min_log2: int = 8,
    max_log2: int = 13,
    randomize: bool = True,
    rng: Draws | None = None,
    overlap: int = 1,
) -> list[tuple[int, int]]:
    """Where rows start in a document of `length` tokens, its end-of-document token included, and the log2 of each.

    The largest power of two that fits comes first. Of a document that is as long as two of the largest rows, or longer,
    buckets are drawn so that all are expected to get equally many of its tokens; without `randomize` it is cut into the
    largest. With an `overlap` of 1 a row shares its last label with the row behind it, with 0 it consumes that token
    too, as the published code does. What is left is shorter than the smallest row, and is discarded.

    `rng` is asked where buckets are drawn; by default these are the draws of document 0 of seed 0.
    """
    if overlap not in (0, 1):
        raise ValueError(f"rows of one document overlap by 0 or 1 tokens, not by {overlap}")
    draws = rng or DocumentDraws(0, 0)
    rows: list[tuple[int, int]] = []
    start = 0
    while (log2 := (length - start - 1).bit_length() - 1) >= min_log2:
        if log2 > max_log2:
            log2 = _bucket(draws.random(), min_log2, max_log2) if randomize else max_log2
        rows.append((start, log2))
        start += (1 << log2) + 1 - overlap
    return rows


def _bucket(fraction: float, min_log2: int, max_log2: int) -> int:
    return int(_buckets(np.array([fraction]), min_log2, max_log2)[0])


def _buckets(fractions: NDArray[np.float64], min_log2: int, max_log2: int) -> NDArray[np.int64]:
    """The bucket 2^k with a probability in proportion to 2^-k: of n buckets the longest one time in 2^n - 1."""
    places = np.floor(fractions * ((1 << (max_log2 - min_log2 + 1)) - 1)).astype(np.int64)
    shorter = np.frexp((places + 1).astype(np.float64))[1] - 1  # floor of log2, exact for integers
    return max_log2 - shorter.astype(np.int64)


def _fractions(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (words >> np.uint64(11)).astype(np.float64) / (1 << 53)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows of one bucket are: `documents` int32 and `starts` int64, `[rows]`."""

    documents: NDArray[np.int32]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, taken: NDArray[np.bool_]) -> Places:
        return Places(self.documents[taken], self.starts[taken])


@dataclass(frozen=True, eq=False)
class Decomposition:
    """`places` of the rows of each bucket, by length, longest first; and what no row has, neither as token nor as
    label: `discarded_tokens`, with all of those `discarded_documents` that are too short for the smallest bucket."""

    places: Mapping[int, Places]
    discarded_tokens: int
    discarded_documents: int

    def of(self, chosen: NDArray[np.int64], lengths: NDArray[np.int64]) -> Decomposition:
        """That of some of the documents alone, whose rows are the same. `lengths` are those of all."""
        wanted, done = np.zeros(len(lengths), np.bool_), np.zeros(len(lengths), np.int64)
        wanted[chosen] = True
        places = {length: some[wanted[some.documents]] for length, some in self.places.items()}
        for length, some in places.items():
            done += length * np.bincount(some.documents, minlength=len(lengths))
        return Decomposition(places, *_discarded(lengths[chosen], done[chosen]))


def decompose(lengths: NDArray[np.int64], shortest: int, longest: int, randomize: bool, seed: int) -> Decomposition:
    """`decompose_document` of all documents of a corpus, with the draws of each; both lengths are powers of two."""
    min_log2, max_log2 = (length.bit_length() - 1 for length in (shortest, longest))
    found: dict[int, list[Places]] = {1 << log2: [] for log2 in range(max_log2, min_log2 - 1, -1)}
    targets = np.maximum(lengths - 1, 0)  # all tokens but the first can be predicted
    done = np.zeros_like(targets)  # of each document's targets

    def add(documents: NDArray[np.int64], starts: NDArray[np.int64], length: int) -> None:
        found[length].append(Places(documents.astype(np.int32), starts))

    if randomize:
        long = np.flatnonzero(targets >= 2 * longest)
        for first in range(0, len(long), _DOCUMENTS_AT_ONCE):
            some = long[first : first + _DOCUMENTS_AT_ONCE]
            drawn = 0
            while len(some):
                words = random_words(seed, some[:, None], np.arange(drawn, drawn + _DRAWN_AT_ONCE))
                sizes = 1 << _buckets(_fractions(words), min_log2, max_log2)
                starts = done[some, None] + sizes.cumsum(1) - sizes
                taken = targets[some, None] - starts >= 2 * longest  # a first part of each line
                documents = np.broadcast_to(some[:, None], sizes.shape)
                for length in found:
                    here = taken & (sizes == length)
                    add(documents[here], starts[here], length)
                done[some] += np.where(taken, sizes, 0).sum(1)
                some = some[taken[:, -1]]
                drawn += _DRAWN_AT_ONCE
    for length in found:
        count = (targets - done) // length  # more than one only of the longest
        documents = np.repeat(np.arange(len(lengths)), count)
        before = np.arange(len(documents)) - np.repeat(count.cumsum() - count, count)
        add(documents, done[documents] + before * length, length)
        done += count * length
    return Decomposition({length: _joined(places) for length, places in found.items()}, *_discarded(lengths, done))


def _discarded(lengths: NDArray[np.int64], done: NDArray[np.int64]) -> tuple[int, int]:
    """Tokens and whole documents that no row has, where rows have `done` tokens of each document."""
    too_short = done == 0
    return int(np.where(too_short, lengths, lengths - 1 - done).sum()), int(too_short.sum())


def _joined(places: list[Places]) -> Places:
    return Places(np.concatenate([p.documents for p in places]), np.concatenate([p.starts for p in places]))


class BucketRows:
    """The rows of one bucket: `length` tokens of one document each, and all of them have a label."""

    def __init__(self, corpus: Corpus, places: Places, length: int) -> None:
        self.length = length
        self._corpus, self._places = corpus, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)}.")
        start = int(self._places.starts[row])
        read = self._corpus.read(int(self._places.documents[row]), start, start + self.length + 1)
        return Row(read[:-1], read[1:], np.array([0, self.length]), np.arange(self.length), self.length)
