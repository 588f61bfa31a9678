"""Rows of tokens, and what every way of making them from documents has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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


def blank_row(length: int, context: int | None = None) -> Row:
    """A row of one document without labels, for what depends on the shape of rows alone."""
    contexts = None if context is None else np.array([context])
    whole = np.arange(length)
    return Row(np.zeros(length, np.int64), np.full(length, IGNORED), np.array([0, length]), whole, 0, contexts)


class RowSource(Protocol):
    """Finitely many rows of one length: documents, packed or cut by one method. Making a row changes nothing."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row:
        """IndexError outside of range(len)."""
