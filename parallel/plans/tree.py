"""A broadcast among ranks as a tree of sends."""

from __future__ import annotations

from collections.abc import Sequence


def halving(ranks: Sequence[int], depth: int = 0) -> list[tuple[int, int, int]]:
    """(source, destination, round) of each send from `ranks[0]` to all others, parents before children.

    The first send crosses to the other half, then each half goes on by itself: log2 rounds, nobody sends more often
    than that, and ranks that are in a row on one node get one send from outside it.
    """
    if len(ranks) == 1:
        return []
    middle = (len(ranks) + 1) // 2
    near, far = ranks[:middle], ranks[middle:]
    return [(ranks[0], far[0], depth), *halving(near, depth + 1), *halving(far, depth + 1)]
