"""The tokens of one split, memory-mapped from its Megatron files."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farspan.data.indexed import TokenFile
from farspan.data.prepared import Prepared

Split = Literal["train", "heldout"]


class Corpus:
    """The documents of one split of prepared data; each ends with the end-of-document token.

    `lengths`: int64 [documents], tokens in each.
    """

    def __init__(self, prepared: Prepared, split: Split) -> None:
        self.split: Split = split
        self._file = TokenFile(prepared.directory / split)
        self.lengths: NDArray[np.int64] = self._file.lengths

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` (half-open) of a document, int64 [stop - start]. Raises IndexError outside of it."""
        return self._file.read(document, start, stop)
