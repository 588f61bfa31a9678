"""How many steps of each bucket the cycles of a run have."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Quotas:
    """Steps of buckets in cycles of `cycle_steps` steps, in proportion to shares that are those of a stage.

    Whole numbers, which follow a stage's shares more closely cycle by cycle. A bucket without a share has no step.
    The very first cycle has a step of its longest bucket, whatever the share of that is.

    shares: from the cycle on with which a stage begins (the first is 0), those of its buckets, the shortest first.
    """

    def __init__(self, shares: Mapping[int, Sequence[float]], cycle_steps: int) -> None:
        self.cycle_steps = cycle_steps
        self._firsts = list(shares)
        self.shares = [np.array(some, np.float64) / np.sum(some) for some in shares.values()]
        self._before = [np.zeros(len(self.shares[0]), np.int64)]

    def steps_before(self, cycle: int) -> NDArray[np.int64]:
        """How many steps of each bucket come before a cycle, int64 `[buckets]`."""
        while len(self._before) <= cycle:
            self._before.append(self._before[-1] + self._next())
        return self._before[cycle]

    def _next(self) -> NDArray[np.int64]:
        cycle = len(self._before) - 1
        stage = bisect_right(self._firsts, cycle) - 1
        shares, first = self.shares[stage], self._firsts[stage]
        wanted = shares * (cycle + 1 - first) * self.cycle_steps - (self._before[cycle] - self._before[first])
        quota = np.floor(np.maximum(wanted, 0)).astype(np.int64)
        while (missing := self.cycle_steps - quota.sum()) != 0:
            if missing > 0:
                quota[np.argmax(wanted - quota)] += 1
            else:
                quota[np.argmin(np.where(quota > 0, wanted - quota, np.inf))] -= 1
        longest = np.flatnonzero(shares)[-1]
        if cycle == 0 and quota[longest] == 0:
            quota[np.argmax(quota)] -= 1
            quota[longest] += 1
        return quota
