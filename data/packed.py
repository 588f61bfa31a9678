"""Rows that a layout describes: any way of packing that is written down as index ranges."""

from __future__ import annotations

import numpy as np

from farspan.data.composition import measure
from farspan.data.documents import Documents
from farspan.data.layout import Layout
from farspan.data.rows import IGNORED, Row


class PackedRows:
    """The rows of a layout. Padding is a document of its own behind the others, without labels.

    unanswered: conversations that are not among the documents, since no answer of theirs would be in a row.
    """

    def __init__(self, documents: Documents, layout: Layout, unanswered: int = 0) -> None:
        self.length, self._unanswered = layout.length, unanswered
        self._documents, self._layout = documents, layout

    @property
    def in_words(self) -> str:
        words = measure(self._layout, self._documents.lengths).in_words
        if not self._unanswered:
            return words
        return f"{words}; {self._unanswered:,} conversations are left out, whose answers begin behind a row's end"

    def __len__(self) -> int:
        return len(self._layout)

    def __getitem__(self, row: int) -> Row:
        pieces = self._layout.row(row)
        tokens = np.zeros(self.length, np.int64)
        labels = np.full(self.length, IGNORED, np.int64)
        positions = np.empty(self.length, np.int64)
        bounds, contexts = [0], []
        for document, start, stop in zip(*(part.tolist() for part in (pieces.documents, pieces.starts, pieces.stops))):
            begin, end = bounds[-1], bounds[-1] + stop - start
            # One token more than the row holds, where there is one: it is the last label.
            read = self._documents.read(document, start, min(stop + 1, int(self._documents.lengths[document])))
            targets = read[1:]
            answers = self._documents.answers(document)
            if answers is not None:
                targets = np.where(answers.hold(start + 1, start + len(read)), targets, IGNORED)
                contexts.append(min(max(answers.context - start, 0), stop - start))
            tokens[begin:end] = read[: stop - start]
            labels[begin : begin + len(targets)] = targets
            positions[begin:end] = np.arange(stop - start)
            bounds.append(end)
        told = bool(contexts) and len(contexts) == len(pieces)
        if (padding := self.length - bounds[-1]) > 0:
            positions[bounds[-1] :] = np.arange(padding)
            contexts.append(padding)  # nothing that would look back at all of it
            bounds.append(self.length)
        return Row(
            tokens,
            labels,
            np.array(bounds, np.int64),
            positions,
            int(np.count_nonzero(labels != IGNORED)),
            np.array(contexts, np.int64) if told else None,
        )
