"""The tokens of one split, memory-mapped from its Megatron files."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farspan.data.prepared import Prepared

Split = Literal["train", "heldout"]


class Corpus:
    """The documents of one split of prepared data; each ends with the end-of-document token.

    `lengths`: int64 [documents], tokens in each.
    """

    def __init__(self, prepared: Prepared, split: Split) -> None:
        # Imported here: it takes seconds, as it brings the whole of Megatron Core with it.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.split: Split = split
        self._dataset = IndexedDataset(str(prepared.directory / split))
        self.lengths: NDArray[np.int64] = self._dataset.sequence_lengths.astype(np.int64)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` (half-open) of a document, int64 [stop - start]. Raises IndexError outside of it."""
        if not 0 <= start <= stop <= self.lengths[document]:
            raise IndexError(f"Document {document} has {self.lengths[document]} tokens, not {start} to {stop}.")
        tokens: NDArray[np.integer] = self._dataset.get(document, offset=start, length=stop - start)
        return tokens.astype(np.int64)
