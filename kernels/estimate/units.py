"""The integers in which scores are counted, so that no sum depends on the order or the grouping of its terms."""

from __future__ import annotations

WEIGHT_BITS = 22
"""Weights of a tile's row count `2 ** -22` of the power of 2 above the highest: 128 of them fit int32."""
SUM_BITS = 16
"""Finer bits of a row's sum over tiles: a million tiles fit int64."""
NOTHING = -(1 << 30)
"""Exponent of a row that sees nothing."""
MASS_BITS = 37
"""Bits of all masses of a head together: what is ranked has 38, and 25 say where it is."""
PLACE_BITS = 25
"""Tokens of a row at most, as a power of 2."""
QUARTERS = 4
STANDS_OUT = 4


def mass_bits(rows: int) -> int:
    """A pair's mass counts `2 ** -bits` of its row's: as many bits as so many rows leave, 30 at most."""
    return min(30, MASS_BITS - (rows - 1).bit_length())
