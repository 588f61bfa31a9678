"""A curriculum over the lengths of rows: each optimizer step takes rows of one bucket, and always as many tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farspan.data.quotas import Quotas
from farspan.data.rows import Row
from farspan.data.sampling import random_words
from farspan.data.steps import SampleStream

Schedule = Literal["random", "sub_cycles"]

# Odds of so many buckets, the shortest first.
ODDS: Mapping[str, Callable[[int], list[float]]] = {
    "uniform": lambda buckets: [1.0] * buckets,
    "grow_linear": lambda buckets: [float(buckets - i) for i in range(buckets)],
    "grow_p2": lambda buckets: [2.0 ** (buckets - 1 - i) for i in range(buckets)],
    "grow_p100": lambda buckets: [100.0 ** (buckets - 1 - i) for i in range(buckets)],
    "shrink_p100": lambda buckets: [100.0**i for i in range(buckets)],
}


class Curriculum:
    """Steps of `tokens_per_step` tokens, each of one bucket, in cycles.

    How many steps of each bucket a cycle has is said by `quotas`. `odds` say only in which order they come, so that
    high odds for short rows let rows grow in every cycle:

    - `random`: at each step a bucket is drawn by its odds from those that the cycle has steps of left. (Algorithm 1 of
      arXiv:2405.13226.)
    - `sub_cycles`: a cycle is cut into as many parts as there are buckets, over which the steps of bucket k are spread
      as the odds of the buckets up to k, backwards, and then of those above: most of them in part k. In a part they
      are shuffled. (The schedule of OLMo-core.)

    The first step of all is of the longest bucket of its cycle, so that a run which does not fit into memory ends at
    once.

    `buckets`, `quotas` and `odds` are ordered from the shortest to the longest. The samples of step s are numbered from
    s times the rows that a step of the shortest bucket has.
    """

    def __init__(
        self,
        buckets: Sequence[SampleStream],
        quotas: Quotas,
        odds: Sequence[float],
        tokens_per_step: int,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.buckets, self.tokens_per_step = list(buckets), tokens_per_step
        self.quotas, self.cycle_steps = quotas, quotas.cycle_steps
        self._odds, self._schedule, self._seed = np.array(odds, np.float64), schedule, seed
        self._most_rows = tokens_per_step // self.buckets[0].length
        self._cycle = lru_cache(maxsize=2)(self._order_of_cycle)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(bucket.length for bucket in reversed(self.buckets))

    def length(self, step: int) -> int:
        return self.buckets[self._place(step)[0]].length

    def samples(self, step: int) -> range:
        first = step * self._most_rows
        return range(first, first + self.tokens_per_step // self.length(step))

    def row(self, sample: int) -> Row:
        step, place = divmod(sample, self._most_rows)
        number, earlier = self._place(step)
        bucket = self.buckets[number]
        return bucket.row(earlier * self._rows_of(bucket) + place)

    def samples_of_each(self, steps: int) -> list[int]:
        """How many samples of each bucket the first `steps` steps take."""
        cycle, at = divmod(steps, self.cycle_steps)
        found = self.quotas.steps_before(cycle)
        if at:
            found = found + np.bincount(self._cycle(cycle)[0][:at], minlength=len(self.buckets))
        return [int(count) * self._rows_of(bucket) for count, bucket in zip(found, self.buckets, strict=True)]

    def lengths_of_steps(self, steps: int) -> NDArray[np.int64]:
        """`length` of each of the first `steps` steps."""
        cycles = range(-(-steps // self.cycle_steps))
        numbers = np.concatenate([self._cycle(cycle)[0] for cycle in cycles])[:steps]
        return np.array([bucket.length for bucket in self.buckets])[numbers]

    def _rows_of(self, bucket: SampleStream) -> int:
        """Rows of one step."""
        return self.tokens_per_step // bucket.length

    def _place(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps of it come before."""
        cycle, at = divmod(step, self.cycle_steps)
        numbers, earlier = self._cycle(cycle)
        number = int(numbers[at])
        return number, int(self.quotas.steps_before(cycle)[number] + earlier[at])

    def _order_of_cycle(self, cycle: int) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """The bucket of each of a cycle's steps, and how many of that bucket come before in the cycle."""
        quota = self.quotas.steps_before(cycle + 1) - self.quotas.steps_before(cycle)
        numbers = np.repeat(np.arange(len(quota), dtype=np.int8), quota)
        words = random_words(self._seed, np.array([cycle]), np.arange(self.cycle_steps))
        fractions = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)
        each = np.split(fractions, quota.cumsum()[:-1])
        times = self._drawn_times(each) if self._schedule == "random" else self._sub_cycle_times(each)
        numbers = numbers[np.argsort(np.concatenate(times), kind="stable")]
        if cycle == 0:
            first = int(np.argmax(numbers == numbers.max()))
            numbers = np.concatenate([numbers[first : first + 1], numbers[:first], numbers[first + 1 :]])
        earlier = np.zeros(len(numbers), np.int64)
        for number, count in enumerate(quota):
            earlier[numbers == number] = np.arange(count)
        return numbers, earlier

    def _drawn_times(self, fractions: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """When each bucket's steps come: at the events of a Poisson process with its odds as rate.

        Of several such processes the next event is of one with a probability in proportion to its rate, whatever came
        before, so that their order is that of draws by the odds from the buckets that are not used up.
        """
        return [np.cumsum(-np.log(values) / odds) for values, odds in zip(fractions, self._odds)]

    def _sub_cycle_times(self, fractions: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """The number of each step's part of the cycle, and its random place in there."""
        times = []
        for number, values in enumerate(fractions):
            weights = np.concatenate([self._odds[number::-1], self._odds[number + 1 :]])
            ends = np.floor(len(values) * weights.cumsum() / weights.sum() + 1e-9)
            times.append(np.searchsorted(ends, np.arange(len(values)), side="right") + values)
        return times


def average_length(tokens: Mapping[int, float]) -> float:
    """Of the rows of a mixture with so many tokens of each length."""
    return sum(tokens.values()) / sum(share / length for length, share in tokens.items())


def average_context(tokens: Mapping[int, float]) -> float:
    """Tokens before a token in its row, averaged over those of a mixture."""
    return sum(share * (length - 1) / 2 for length, share in tokens.items()) / sum(tokens.values())
