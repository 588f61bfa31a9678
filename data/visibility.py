"""Which tokens of a packed row see which: their documents, and windows or Star Attention's blocks within these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.rows import Row
from farspan.kernels import IntervalMask, masks


@dataclass(frozen=True)
class Star:
    """Star Attention (arXiv:2411.17116): a document is its context, in blocks that also see the anchor, and then its
    global part, which sees all of the document.

    `global_fraction` is the global part's share of a document; None where rows say it themselves (`Row.contexts`). A
    document of less than two blocks is dense: it would save nothing.
    """

    block: int
    anchor: int
    global_fraction: float | None

    def contexts(self, row: Row, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 `[documents]`: tokens of each document's context, 0 where all of it is dense."""
        sizes = np.diff(bounds)
        if self.global_fraction is not None:
            given = sizes - np.maximum(1, np.round(sizes * self.global_fraction).astype(np.int64))
        elif row.contexts is not None:
            given = np.minimum(row.contexts, sizes)
        else:
            raise DataError(
                "attention.star.mode sft takes the end of each document's context from the data, and packed text does "
                "not tell it; set attention.star.mode to lm"
            )
        return np.where(sizes < 2 * self.block, 0, given)


@dataclass(frozen=True)
class Window:
    """A sliding window: tokens see the last `width` tokens, themselves included, and their document's first `sinks`."""

    width: int
    sinks: int = 0


@dataclass(frozen=True)
class Visibility:
    """Tokens see what comes before them in their document, all of it or what a window or Star Attention leaves.

    With `across_documents` a row counts as one document. Layers of one model may differ in `window` and `star`.
    """

    across_documents: bool = False
    star: Star | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        if self.star is not None and self.window is not None:
            raise ValueError("one layer has Star Attention's blocks or a window, not both")

    @property
    def in_words(self) -> str:
        if self.star is not None:
            return f"blocks of {self.star.block:,} tokens and the anchor"
        if self.window is not None:
            sinks = f" and the first {self.window.sinks:,}" if self.window.sinks else ""
            return f"the last {self.window.width:,} tokens{sinks}"
        return "all before"

    def mask(self, rows: Sequence[Row]) -> IntervalMask:
        """`[1 or rows, length]`, in positions. DataError where Star Attention cannot tell a document's context."""
        alike = all(_same_documents(row, rows[0]) for row in rows)
        if self.across_documents or alike:
            return self._mask(rows[0])
        return masks.stack(self._mask(row) for row in rows)

    def roaming(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        """`[length]`: positions that are in the global part of a document in some row, for the order `two_class`."""
        found = np.zeros(len(rows[0].tokens), bool)
        for row in rows if self.star is not None else ():
            assert self.star is not None
            bounds = self._documents(row)
            sizes, contexts = np.diff(bounds), self.star.contexts(row, bounds)
            # Dense documents stay: they are at one or two ranks as they are.
            starts = np.where(sizes < 2 * self.star.block, sizes, contexts)
            found |= np.arange(len(found)) - np.repeat(bounds[:-1], sizes) >= np.repeat(starts, sizes)
        return found

    def _mask(self, row: Row) -> IntervalMask:
        length, bounds = len(row.tokens), self._documents(row)
        if self.window is not None:
            return masks.sliding_window(length, self.window.width, self.window.sinks, bounds.tolist())
        if self.star is None:
            return masks.causal(length, bounds.tolist())
        contexts = self.star.contexts(row, bounds).tolist()
        return masks.star(length, self.star.block, self.star.anchor, contexts, bounds.tolist())

    def _documents(self, row: Row) -> NDArray[np.int64]:
        return np.array([0, len(row.tokens)]) if self.across_documents else row.cu_seqlens


def _same_documents(one: Row, other: Row) -> bool:
    if one.contexts is None or other.contexts is None:
        return one.contexts is other.contexts and np.array_equal(one.cu_seqlens, other.cu_seqlens)
    return np.array_equal(one.cu_seqlens, other.cu_seqlens) and np.array_equal(one.contexts, other.contexts)


BY_DOCUMENT = Visibility()
