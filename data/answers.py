"""What a document of question and answer says besides its tokens: where its context ends, and which tokens are answers.

Notes lie in Megatron files of their own beside the tokens, `SPLIT_answers.bin` and `.idx`, with an entry for each
document of the split: the tokens of its context, then begin and end of each answer; nothing for plain text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def notes_name(split: str) -> str:
    """The files of a split's notes, without their suffixes."""
    return f"{split}_answers"


def has_notes(directory: Path, split: str) -> bool:
    """Whether prepared data has notes for a split."""
    return (directory / f"{notes_name(split)}.idx").is_file()


@dataclass(frozen=True, eq=False)
class Answers:
    """context: tokens before the question. spans: int64 [answers, 2], ascending: tokens begin to end (half-open)."""

    context: int
    spans: NDArray[np.int64]

    @classmethod
    def of_notes(cls, notes: NDArray[np.integer]) -> Answers | None:
        """From a document's entry `[0 or 1 + 2 * answers]`; None for plain text."""
        if not len(notes):
            return None
        return cls(int(notes[0]), np.asarray(notes[1:], np.int64).reshape(-1, 2))

    def notes(self) -> NDArray[np.int32]:
        return np.append(self.context, self.spans.ravel()).astype(np.int32)

    def hold(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Boolean `[stop - start]`: which of the document's tokens `start` to `stop` are part of an answer."""
        places = np.arange(start, stop)
        before = np.searchsorted(self.spans[:, 0], places, side="right")  # answers that have begun
        ended = np.searchsorted(self.spans[:, 1], places, side="right")
        return before > ended
