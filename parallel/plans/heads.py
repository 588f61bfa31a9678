"""Dividing heads among ranks, with the kv heads that they read."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

_WAVES = 4


class Share(NamedTuple):
    """Query heads of the rank at `place`, and the kv heads that they read; both half-open.

    They are exchanged with those of the same `wave`, while the heads of the wave before are computed.
    """

    place: int
    wave: int
    queries: tuple[int, int]
    keys: tuple[int, int]


def shares(heads: tuple[int, int], places: int) -> list[Share]:
    """Equal parts of the query heads for all places, as nearly as whole heads allow, in up to four waves each.

    A wave is some whole kv heads with the place's query heads that read them. A place whose heads begin or end inside a
    kv head's group has a share for each of its kv heads, so that no block of keys holds heads that only some of its
    readers need: 6 heads over 2, 3 places: 0:2 on kv 0, then 2:3 on kv 0 and 3:4 on kv 1, then 4:6 on kv 1.
    """
    query_heads, kv_heads = heads
    group = query_heads // kv_heads
    found = []
    for place, (low, high) in enumerate(pairwise(place * query_heads // places for place in range(places + 1))):
        if low == high:
            continue
        first, last = low // group, (high - 1) // group + 1
        waves = min(_WAVES, last - first) if places > 1 else 1  # one place has nobody to exchange with
        whole = low % group == high % group == 0
        count = waves if whole else last - first
        edges = [first + i * (last - first) // count for i in range(count + 1)]
        for number, (kv, stop) in enumerate(pairwise(edges)):
            queries = max(low, kv * group), min(high, stop * group)
            found.append(Share(place, number * waves // count, queries, (kv, stop)))
    return found
