"""A schedule as columns, one array an attribute: how millions of moves and pieces are looked at together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
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
        names = [move.link for move in moves]
        links = tuple(sorted(set(names)))
        number = {name: index for index, name in enumerate(links)}
        return cls(
            np.array([move.block for move in moves], np.int64),
            np.array([move.src for move in moves], np.int64),
            np.array([move.dst for move in moves], np.int64),
            np.array([move.start for move in moves], np.int64),
            np.array([move.stop for move in moves], np.int64),
            np.array([move.home for move in moves], bool),
            np.array([number[name] for name in names], np.int64),
            links,
        )


class Uses(NamedTuple):
    """The blocks of one side that pieces take, piece after piece: int64 `[uses]`, and `counts` `[pieces]` of them."""

    blocks: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, blocks: Sequence[tuple[int, ...]]) -> Uses:
        counts = np.array([len(some) for some in blocks], np.int64)
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
            np.array([piece.rank for piece in pieces], np.int64),
            np.array([piece.stage for piece in pieces], np.int64),
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


def cells(table: np.ndarray, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A contiguous table as one axis, and indices of cells there, for a ufunc's `at`: much faster than with two."""
    return table.reshape(-1), row * table.shape[1] + column
