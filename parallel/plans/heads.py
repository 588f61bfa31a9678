"""Dividing heads among ranks, with the kv heads that they read."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Share(NamedTuple):
    """Query heads of the rank at `place`, and the kv heads that they read; both half-open."""

    place: int
    queries: tuple[int, int]
    keys: tuple[int, int]


def shares(heads: tuple[int, int], places: int) -> list[Share]:
    """Equal shares of the query heads, as nearly as whole heads allow.

    A place whose heads begin or end inside a kv head's group has a share for each of its kv heads, so that no block of
    keys holds heads that only some of its readers need: 6 heads over 2, 3 places: 0:2 on kv 0, 2:3 on kv 0 and 3:4 on
    kv 1, 4:6 on kv 1.
    """
    query_heads, kv_heads = heads
    group = query_heads // kv_heads
    found = []
    for place, (low, high) in enumerate(pairwise(place * query_heads // places for place in range(places + 1))):
        if low == high:
            continue
        if low % group == high % group == 0:
            found.append(Share(place, (low, high), (low // group, high // group)))
            continue
        for kv in range(low // group, (high - 1) // group + 1):
            found.append(Share(place, (max(low, kv * group), min(high, (kv + 1) * group)), (kv, kv + 1)))
    return found
