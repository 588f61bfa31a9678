"""The ways of making rows of one length, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farspan.data.best_fit import best_fit_layout
from farspan.data.concatenated import ConcatRows
from farspan.data.documents import Documents, Selection, answered_within
from farspan.data.errors import DataError
from farspan.data.layout import Layout, Overlong, concatenated, padded
from farspan.data.packed import PackedRows
from farspan.data.rows import RowSource

MethodName = Literal["concat", "best_fit", "padded"]


@dataclass(frozen=True)
class Method:
    """How documents become rows of `length` tokens: `concat` cuts one stream of all, `best_fit` puts as many into a row
    as fit, `padded` gives each a row of its own."""

    name: MethodName
    length: int
    seed: int
    overlong: Overlong

    def layout(self, lengths: NDArray[np.int64]) -> Layout:
        """Of documents with `lengths` tokens, int64 [documents]."""
        if self.name == "concat":
            return concatenated(lengths, self.length, self.seed)
        if self.name == "best_fit":
            return best_fit_layout(lengths, self.length, self.seed, self.overlong)
        return padded(lengths, self.length, self.overlong)

    def rows(self, documents: Documents) -> tuple[RowSource, int]:
        """Rows of these documents, and the tokens of text in them. DataError when there is none.

        Conversations that are truncated before their first answer are left out: nothing of them has a label.
        """
        if self.name == "concat":
            # Without a layout, which would be as large as the text has documents and rows.
            rows = ConcatRows(documents, self.length, self.seed)
            return rows, len(rows) * self.length
        unanswered = 0
        if self.overlong == "truncate":
            answered = answered_within(documents, self.length)
            unanswered = int(np.count_nonzero(~answered))
            if unanswered == len(answered):
                raise DataError(
                    f"none of {unanswered:,} conversations of the {documents.split} split has an answer in its first "
                    f"{self.length:,} tokens, which data.overlong truncate keeps: raise train.sequence_length, or "
                    "change what is there (data.sources, data.heldout_fraction, data.blend.parts)."
                )
            if unanswered:
                documents = Selection(documents, np.flatnonzero(answered))
        layout = self.layout(documents.lengths)
        return PackedRows(documents, layout, unanswered), int(layout.pieces.sizes.sum())
