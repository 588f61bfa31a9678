"""Which parts of which documents rows hold, as index ranges: nothing of the text is copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.sampling import shuffled

Overlong = Literal["split", "truncate", "drop"]
"""What becomes of a document that is longer than a row: full rows and a rest, its beginning, or nothing."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of documents. documents, starts, stops: int64 [pieces], tokens `starts` to `stops` (half-open) of each."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.stops - self.starts

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, taken: NDArray[np.int64] | slice) -> Pieces:
        return Pieces(self.documents[taken], self.starts[taken], self.stops[taken])


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows of `length` tokens: row r holds pieces `offsets[r]` to `offsets[r + 1]` (int64 [rows + 1]), then padding."""

    length: int
    pieces: Pieces
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, row: int) -> Pieces:
        """IndexError outside of range(len)."""
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)}.")
        return self.pieces[slice(self.offsets[row], self.offsets[row + 1])]


def padded(lengths: NDArray[np.int64], length: int, overlong: Overlong) -> Layout:
    """A row for every piece of a document. `lengths`: int64 [documents], tokens of each."""
    pieces = cut(lengths, length, overlong)
    return Layout(length, pieces, np.arange(len(pieces) + 1))


def concatenated(lengths: NDArray[np.int64], length: int, seed: int) -> Layout:
    """The rows of `ConcatRows`: documents in an order of the seed as one stream, cut every `length` tokens."""
    order = shuffled(len(lengths), seed)
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) // length * length if len(ends) else 0
    cuts = np.unique(np.concatenate([np.arange(0, total + 1, length), ends[ends < total]]))
    begins = ends - lengths[order]
    places = np.searchsorted(ends, cuts[:-1], side="right")
    starts, stops = cuts[:-1] - begins[places], cuts[1:] - begins[places]
    return Layout(length, Pieces(order[places], starts, stops), np.searchsorted(cuts, np.arange(0, total + 1, length)))


def cut(lengths: NDArray[np.int64], length: int, overlong: Overlong) -> Pieces:
    """Documents as pieces of at most `length` tokens, in order; what is too long is treated as `overlong` says.

    Raises DataError when nothing is left.
    """
    documents = np.flatnonzero((lengths > 0) & ((lengths <= length) | (overlong != "drop")))
    sizes = lengths[documents] if overlong == "split" else np.minimum(lengths[documents], length)
    counts = -(-sizes // length)
    documents, sizes = np.repeat(documents, counts), np.repeat(sizes, counts)
    # Which piece of its document each is: all before it, less those of earlier documents.
    places = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = places * length
    if not len(documents):
        raise DataError(
            f"none of {len(lengths)} documents fits into rows of train.sequence_length {length}: raise "
            "train.sequence_length, or set data.overlong to truncate."
        )
    return Pieces(documents, starts, np.minimum(starts + length, sizes))
