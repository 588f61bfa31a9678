"""What estimators over cells or chunks of a row need to know of its documents."""

from __future__ import annotations

import numpy as np
import torch

from farspan.kernels.masks import IntervalMask


def document_starts(mask: IntervalMask) -> np.ndarray:
    """int64 `[B or 1, rows]`: where each row's document starts, with a row that sees nothing before itself."""
    lowest = torch.minimum(mask.begin, mask.anchor_begin).numpy()
    row = np.arange(mask.rows)
    return np.maximum.accumulate(np.where(lowest == row, row, 0), axis=1)


def counted(starts: np.ndarray, size: int) -> np.ndarray:
    """Bool `[B or 1, rows]`: whether a token is of the document to which the last token of its unit belongs.

    A row is cut into units of `size` tokens. All rows behind a unit that see anything in it are of that document, so
    that what is made of these tokens alone never looks across documents. `starts` are those of `document_starts`.
    """
    row = np.arange(starts.shape[1])
    last = np.minimum((row // size + 1) * size, len(row)) - 1
    return row >= starts[:, last]
