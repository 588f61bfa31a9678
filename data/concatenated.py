"""Concat-and-chunk: documents one after the other, cut into rows of equal length."""

import numpy as np

from farspan.data.documents import Documents
from farspan.data.errors import TooLittleTextError
from farspan.data.rows import IGNORED, Row
from farspan.data.sampling import shuffled


class ConcatRows:
    """The documents of a corpus in an order fixed by the seed, as one stream of tokens cut every `length` tokens.

    The incomplete row at the end is dropped. Nothing of the stream's size is held: a row is found by bisection over
    the documents' ends. Raises TooLittleTextError when the corpus does not fill one row.
    """

    def __init__(self, corpus: Documents, length: int, seed: int) -> None:
        self.length = length
        self._corpus = corpus
        self._order = shuffled(len(corpus.lengths), seed)
        self._ends = np.cumsum(corpus.lengths[self._order])  # of each document in the stream, int64 [documents]
        tokens = int(corpus.lengths.sum())
        self._rows = tokens // length
        if self._rows == 0:
            raise TooLittleTextError(
                f"train.sequence_length is {length}, but the {corpus.split} split has only {tokens} tokens: lower "
                "train.sequence_length, or prepare more text in data.sources."
            )

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self._rows:
            raise IndexError(f"Row {row} of {self._rows}.")
        start, stop = row * self.length, (row + 1) * self.length
        tokens = np.empty(self.length, np.int64)
        labels = np.full(self.length, IGNORED, np.int64)
        positions = np.empty(self.length, np.int64)
        boundaries = [0]

        place = int(np.searchsorted(self._ends, start, side="right"))  # of the document that holds token `start`
        while boundaries[-1] < self.length:
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
