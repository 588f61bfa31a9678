"""How the tokens of a run are divided over parts of a blend and lengths of rows at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-4  # of all tokens
_ROUNDS = 10_000


class MixingError(ValueError):
    """No table has the sums that were asked for. part: the one that misses its weight most; most: what it can have."""

    def __init__(self, part: int, most: float) -> None:
        super().__init__(f"part {part} can have {most:.2%} of the tokens")
        self.part, self.most = part, most


def mix(
    text: NDArray[np.float64], weights: NDArray[np.float64], mixture: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Shares of all tokens by part and length, `[parts, lengths]`, of which each part has its weight `[parts]`.

    text: tokens that there are, `[parts, lengths]`. Without a mixture `[lengths]` each part has the lengths that its
    text has. With one, lengths have these shares, and of all tables with such sums it is the one nearest to that
    (iterative proportional fitting: Deming and Stephan, 1940).

    Raises MixingError when there is none, for parts have tokens of too few lengths.
    """
    weights = weights / weights.sum()
    table = text * (weights / np.maximum(text.sum(1), 1))[:, None]
    if mixture is None:
        return table
    mixture = mixture / mixture.sum()
    for _ in range(_ROUNDS):
        table = table * _quotient(mixture, table.sum(0))
        missed = weights - table.sum(1)
        if np.abs(missed).max() < _TOLERANCE:
            return table
        table = table * _quotient(weights, table.sum(1))[:, None]
    part = int(np.argmax(missed))
    raise MixingError(part, float(weights[part] - missed[part]))


def _quotient(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where nothing was found."""
    return np.divide(wanted, found, out=np.zeros_like(wanted), where=found > 0)
