"""Best-fit packing: rows of whole documents, which are cut only where they are longer than a row (arXiv:2404.10830)."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from farspan.data.layout import Layout, Overlong, cut
from farspan.data.sampling import shuffled


def best_fit_layout(lengths: NDArray[np.int64], length: int, seed: int, overlong: Overlong) -> Layout:
    """`lengths`: int64 [documents], tokens of each. Which of equally long documents share a row is the seed's choice.

    Raises DataError when no document is left.
    """
    pieces = cut(lengths, length, overlong)
    mixed = shuffled(len(pieces), seed)
    pieces = pieces[mixed[np.argsort(-pieces.sizes[mixed], kind="stable")]]
    rows = best_fit(pieces.sizes, length)
    by_row = np.argsort(rows, kind="stable")
    return Layout(length, pieces[by_row], np.concatenate(([0], np.cumsum(np.bincount(rows)))))


def best_fit(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece, int64 [pieces]: the fullest one in which it fits, or a new one ("best-fit decreasing").

    `sizes` descend and are 1 to `capacity`. Pieces of one size go into rows that are equally full all at once: the
    fullest row that a piece fits into remains that for the next one of this size until none fits any more. So work is
    counted by sizes and not by pieces, of which there may be millions.
    """
    rows = np.empty(len(sizes), np.int64)
    open_rows = _OpenRows(capacity)
    edges = np.flatnonzero(np.diff(sizes, prepend=-1, append=-1)).tolist()
    for begin, end in pairwise(edges):
        size = int(sizes[begin])
        while begin < end:
            space = open_rows.least_space(size)
            fitting = space // size  # pieces that each of these rows takes
            taken = open_rows.take(space, -(-(end - begin) // fitting))
            placed = min(len(taken) * fitting, end - begin)
            rows[begin : begin + placed] = np.repeat(taken, fitting)[:placed]
            full, rest = divmod(placed, fitting)
            open_rows.add(space - fitting * size, taken[:full])
            open_rows.add(space - rest * size, taken[full:])
            begin += placed
    return rows


class _OpenRows:
    """Rows by the space that is left in them. New rows are opened as they are taken."""

    _WORD = 1024

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: defaultdict[int, list[NDArray[np.int64]]] = defaultdict(list)
        self._opened = 0
        # Which spaces some row has, as bits: one for each space, and one for each word of these that is not zero.
        self._spaces = [0] * (capacity // self._WORD + 1)
        self._words = 0

    def least_space(self, size: int) -> int:
        """The smallest space of any row that takes a piece of this size; that of a new row where there is none."""
        word, bit = divmod(size, self._WORD)
        found = self._spaces[word] >> bit << bit
        if not found:
            words = self._words >> (word + 1) << (word + 1)
            if not words:
                return self._capacity
            word = _lowest(words)
            found = self._spaces[word]
        return word * self._WORD + _lowest(found)

    def take(self, space: int, most: int) -> NDArray[np.int64]:
        """Removes rows with this space, `most` at most and one at least."""
        if space == self._capacity:
            self._opened += most
            return np.arange(self._opened - most, self._opened)
        last = self._rows[space].pop()
        if len(last) > most:
            self._rows[space].append(last[most:])
        elif not self._rows[space]:
            self._mark(space, False)
        return last[:most]

    def add(self, space: int, rows: NDArray[np.int64]) -> None:
        if space == 0 or not len(rows):
            return
        if not self._rows[space]:
            self._mark(space, True)
        self._rows[space].append(rows)

    def _mark(self, space: int, present: bool) -> None:
        word, bit = divmod(space, self._WORD)
        self._spaces[word] = self._spaces[word] | 1 << bit if present else self._spaces[word] & ~(1 << bit)
        self._words = self._words | 1 << word if self._spaces[word] else self._words & ~(1 << word)


def _lowest(bits: int) -> int:
    """The place of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
