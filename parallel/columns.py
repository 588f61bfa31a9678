"""A schedule as columns, one array an attribute: how millions of moves and pieces are looked at together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from farspan.parallel.plan import Move, Piece


class MoveColumns(NamedTuple):
    """The attributes of moves, int64 `[moves]` each; `home` is boolean, `link` an index into `links`."""

    block: np.ndarray
    src: np.ndarray
    dst: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    home: np.ndarray
    link: np.ndarray
    links: tuple[str, ...]

    @classmethod
    def of(cls, moves: Sequence[Move]) -> MoveColumns:
        names = list(map(attrgetter("link"), moves))
        links = tuple(sorted(set(names)))
        number = {name: index for index, name in enumerate(links)}
        numbers = np.fromiter(map(number.__getitem__, names), np.int64, len(names))
        block, src, dst, start, stop = (_column(moves, name) for name in ("block", "src", "dst", "start", "stop"))
        return cls(block, src, dst, start, stop, _column(moves, "home").astype(bool), numbers, links)


class Uses(NamedTuple):
    """The blocks of one side that pieces take, piece after piece: int64 `[uses]`, and `counts` `[pieces]` of them."""

    blocks: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, blocks: Sequence[tuple[int, ...]]) -> Uses:
        counts = np.fromiter(map(len, blocks), np.int64, len(blocks))
        return cls(np.fromiter(chain.from_iterable(blocks), np.int64, int(counts.sum())), counts)

    @property
    def pieces(self) -> np.ndarray:
        """int64 `[uses]`: the piece of each use."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


class PieceColumns(NamedTuple):
    """`rank` and `stage` int64 `[pieces]`, and the blocks that each takes."""

    rank: np.ndarray
    stage: np.ndarray
    q: Uses
    kv: Uses

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> PieceColumns:
        return cls(
            _column(pieces, "rank"),
            _column(pieces, "stage"),
            Uses.of([piece.q for piece in pieces]),
            Uses.of([piece.kv for piece in pieces]),
        )

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each block of rows beside each block of keys of its piece: piece, q block and kv block, int64 `[pairs]`."""
        partners = self.kv.counts[self.q.pieces]
        piece, q = np.repeat(self.q.pieces, partners), np.repeat(self.q.blocks, partners)
        partner = np.arange(len(q)) - np.repeat(partners.cumsum() - partners, partners)
        first = self.kv.counts.cumsum() - self.kv.counts
        return piece, q, self.kv.blocks[first[piece] + partner]


def _column(items: Sequence[Move] | Sequence[Piece], name: str) -> np.ndarray:
    return np.fromiter(map(attrgetter(name), items), np.int64, len(items))


def cells(table: np.ndarray, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A contiguous table as one axis, and indices of cells there, for a ufunc's `at`: much faster than with two."""
    return table.reshape(-1), row * table.shape[1] + column
