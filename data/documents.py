"""What rows are made of: tokens of numbered documents."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farspan.data.answers import Answers


class Documents(Protocol):
    """A split of prepared data, or a part of it."""

    @property
    def split(self) -> str:
        """The name of the split."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [documents], tokens in each."""

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` (half-open) of a document, int64 [stop - start]. IndexError outside of it."""

    @property
    def told(self) -> NDArray[np.bool_]:
        """Boolean [documents]: which ones say what their answers are."""

    def answers(self, document: int) -> Answers | None:
        """Which of a document's tokens carry loss; None where all do."""


def answered_within(documents: Documents, length: int) -> NDArray[np.bool_]:
    """Boolean [documents]: those of whose first `length` tokens one has a label; of plain text all."""
    found = np.ones(len(documents.lengths), np.bool_)
    for document in np.flatnonzero(documents.told & (documents.lengths > length)).tolist():
        answers = documents.answers(document)
        assert answers is not None
        begins, ends = answers.spans.T
        found[document] = bool(np.any((begins <= length) & (ends > 1)))  # the last label is the token behind them
    return found


class Selection:
    """Some of the documents, numbered anew in the order of `chosen` (int64 [documents])."""

    def __init__(self, documents: Documents, chosen: NDArray[np.int64]) -> None:
        self.split = documents.split
        self.lengths, self.told = documents.lengths[chosen], documents.told[chosen]
        self.chosen, self._documents = chosen, documents

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        return self._documents.read(int(self.chosen[document]), start, stop)

    def answers(self, document: int) -> Answers | None:
        return self._documents.answers(int(self.chosen[document]))
