"""Concat-and-chunk: documents one after the other, cut into rows of equal length."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.sampling import shuffled

IGNORED = -100  # the label of a token that has nothing to predict


@dataclass(frozen=True)
class Row:
    """One row of `length` tokens from one or more documents, in the order of the text.

    tokens: int64 [length].
    labels: int64 [length], the next token of the same document; -100 at a document's last token. Where a document
        goes on in the next row, the last label is its true next token.
    cu_seqlens: int64 [documents + 1], where each document (or part of one) starts in the row; from 0 to length.
    positions: int64 [length], the place of each token since its document's start in this row, for rotary embeddings.
    valid: the number of labels that are not -100.
    contexts: int64 [documents], for question and answer: the tokens of each document before its question; None for
        plain text.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]
    positions: NDArray[np.int64]
    valid: int
    contexts: NDArray[np.int64] | None = None


def blank_row(length: int) -> Row:
    """A row of one document without labels, for what depends on the shape of rows alone."""
    whole = np.arange(length)
    return Row(np.zeros(length, np.int64), np.full(length, IGNORED), np.array([0, length]), whole, 0)


class Rows:
    """The documents of a corpus in an order fixed by the seed, as one stream of tokens cut every `length` tokens.

    The incomplete row at the end is dropped. Nothing of the stream's size is held: a row is found by bisection over
    the documents' ends. Raises DataError when the corpus does not fill one row.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int) -> None:
        self._corpus = corpus
        self._length = length
        self._order = shuffled(len(corpus.lengths), seed)
        self._ends = np.cumsum(corpus.lengths[self._order])  # of each document in the stream, int64 [documents]
        tokens = int(corpus.lengths.sum())
        self._rows = tokens // length
        if self._rows == 0:
            raise DataError(
                f"train.sequence_length is {length}, but the {corpus.split} split has only {tokens} tokens: lower "
                "train.sequence_length, or prepare more text in data.sources."
            )

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self._rows:
            raise IndexError(f"Row {row} of {self._rows}.")
        start, stop = row * self._length, (row + 1) * self._length
        tokens = np.empty(self._length, np.int64)
        labels = np.full(self._length, IGNORED, np.int64)
        positions = np.empty(self._length, np.int64)
        boundaries = [0]

        place = int(np.searchsorted(self._ends, start, side="right"))  # of the document that holds token `start`
        while boundaries[-1] < self._length:
            document, document_stop = int(self._order[place]), int(self._ends[place])
            document_start = document_stop - int(self._corpus.lengths[document])
            first = start + boundaries[-1]
            last = min(stop, document_stop)
            # One token more than the row holds, where there is one: it is the last label.
            read = self._corpus.read(document, first - document_start, min(last + 1, document_stop) - document_start)
            here = slice(first - start, last - start)
            tokens[here] = read[: last - first]
            labels[here.start : here.start + len(read) - 1] = read[1:]
            positions[here] = np.arange(last - first)
            boundaries.append(here.stop)
            place += 1
        valid = int(np.count_nonzero(labels != IGNORED))
        return Row(tokens, labels, np.array(boundaries, np.int64), positions, valid)
