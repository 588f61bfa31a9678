"""The tokens of one split, memory-mapped from its Megatron files."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farspan.data.answers import Answers, has_notes, notes_name
from farspan.data.errors import DataError
from farspan.data.indexed import TokenFile
from farspan.data.prepared import Prepared

Split = Literal["train", "heldout"]


class Corpus:
    """The documents of one split of prepared data; each ends with the end-of-document token.

    `lengths`: int64 [documents], tokens in each. `told`: boolean [documents], which ones say what their answers are.
    """

    def __init__(self, prepared: Prepared, split: Split) -> None:
        self.split: Split = split
        self._vocabulary_size = prepared.vocabulary_size
        self._file = TokenFile(prepared.directory / split)
        self.lengths: NDArray[np.int64] = self._file.lengths
        told = has_notes(prepared.directory, split)
        self._notes = TokenFile(prepared.directory / notes_name(split)) if told else None
        self.told: NDArray[np.bool_] = (
            np.zeros(len(self.lengths), bool) if self._notes is None else self._notes.lengths > 0
        )

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` (half-open) of a document, int64 [stop - start].

        Raises IndexError outside of it, and DataError for tokens that are not in the vocabulary.
        """
        tokens = self._file.read(document, start, stop)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocabulary_size:
            raise DataError(
                f"{self._file.bin} is damaged: document {document:,} has token ids from {tokens.min()} to "
                f"{tokens.max()}, and the vocabulary those from 0 to {self._vocabulary_size - 1}: prepare again, or "
                "copy the file again. `farspan data verify` looks for other damage."
            )
        return tokens

    def answers(self, document: int) -> Answers | None:
        """Which of a document's tokens carry loss; None where all do."""
        if self._notes is None:
            return None
        return Answers.of_notes(self._notes.read(document, 0, int(self._notes.lengths[document])))
