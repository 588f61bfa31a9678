"""How long documents are, by powers of two."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1 << 20
_BAR = 40  # characters


@dataclass(frozen=True)
class Histogram:
    """Row k: the documents of 2^k to 2^(k+1) - 1 tokens.

    documents, tokens: int64 [rows], how many such documents there are and how many tokens they hold together.
    """

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def of(cls, lengths: NDArray[np.int64]) -> "Histogram":
        """Of documents of `lengths` tokens [documents], each at least one."""
        documents, tokens = np.zeros(32, np.int64), np.zeros(32, np.int64)
        for first in range(0, len(lengths), _AT_ONCE):
            some = lengths[first : first + _AT_ONCE]
            rows = np.frexp(some.astype(np.float64))[1] - 1
            documents += np.bincount(rows, minlength=32)
            np.add.at(tokens, rows, some)
        used = int(np.max(np.flatnonzero(documents), initial=-1)) + 1
        return cls(documents[:used], tokens[:used])

    @property
    def first(self) -> int:
        """The first row with documents in it; 0 where there are none."""
        return int(np.min(np.flatnonzero(self.documents), initial=len(self.documents))) if len(self.documents) else 0

    def as_json(self) -> list[dict[str, int]]:
        return [
            {"from": 1 << row, "documents": int(self.documents[row]), "tokens": int(self.tokens[row])}
            for row in range(self.first, len(self.documents))
        ]

    def lines(self) -> list[str]:
        """A table: documents and tokens of each row, and which share of the tokens lies in documents up to there."""
        if not len(self.documents):
            return ["no documents"]
        total, most = max(1, int(self.tokens.sum())), max(1, int(self.tokens.max()))
        lines = [f"{'tokens a document':>23} {'documents':>12} {'tokens':>16} {'up to here':>10}"]
        done = 0
        for row in range(self.first, len(self.documents)):
            tokens = int(self.tokens[row])
            done += tokens
            bounds = f"{1 << row:,} - {(2 << row) - 1:,}"
            bar = "#" * round(_BAR * tokens / most)
            lines.append(f"{bounds:>23} {self.documents[row]:>12,} {tokens:>16,} {done / total:>10.1%} {bar}")
        return lines
