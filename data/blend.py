"""A blend of row sources by weights, in stages: which source a sample comes from is a formula, and nothing is drawn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farspan.data.errors import DataError
from farspan.data.rows import Row, RowSource
from farspan.data.sampling import sample_index

_ONE = 1 << 40  # shares are whole multiples of one part in this many: counts are exact at any sample number
_FOREVER = 1 << 60


@dataclass(frozen=True)
class Part:
    """A source of rows. tokens: tokens of text in all of them; epochs: how often each row is taken at most."""

    rows: RowSource
    tokens: int
    epochs: float | None = None

    @property
    def most_rows(self) -> int:
        return _FOREVER if self.epochs is None else int(self.epochs * len(self.rows))


@dataclass(frozen=True)
class Taken:
    """What was taken of a part: rows, their tokens of text, and how often that is all of the part."""

    rows: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class Stage:
    """For `samples` samples (None: without end) parts give shares of the tokens by weight; others rest."""

    samples: int | None
    weights: Mapping[str, float]


@dataclass(frozen=True)
class _Segment:
    """Samples from `first` on, of which each part takes a fixed share; `before` counts its rows until then."""

    first: int
    shares: tuple[int, ...]
    before: tuple[int, ...]

    def counts(self, sample: int) -> tuple[int, ...]:
        """Rows of each part in the first `sample` samples of the blend."""
        taken = _divide(sample - self.first, self.shares)
        return tuple(before + count for before, count in zip(self.before, taken, strict=True))


class Blend:
    """A stream of samples from several parts, all with rows of one length.

    At every sample each part has had its share so far, but for a few rows. A part takes its rows in an order of the
    seed, each once an epoch, and goes on where it was when it comes back in a later stage. One that has had all its
    epochs leaves its share to the others, in proportion; where none is left in a stage, the blend ends.

    Raises DataError when a weight is of no part, a stage has none, or the epochs of a part are less than one row.
    """

    def __init__(self, parts: Mapping[str, Part], stages: Sequence[Stage], seed: int) -> None:
        self.names = tuple(parts)
        self._parts, self._seed = tuple(parts.values()), seed
        lengths = {part.rows.length for part in self._parts}
        if len(lengths) != 1:
            raise ValueError(f"parts of a blend have rows of one length, not {sorted(lengths)}")
        self.length = lengths.pop()
        for name, part in parts.items():
            if not part.most_rows:
                raise DataError(
                    f"data.blend.parts.{name}.epochs {part.epochs:g} of {len(part.rows):,} rows of {self.length:,} "
                    "tokens is less than one row: raise it, or leave the part out."
                )
        self._segments: list[_Segment] = []
        self.samples = 0  # how many there are in all
        before = (0,) * len(parts)
        for stage in stages:
            end = _FOREVER if stage.samples is None else self.samples + stage.samples
            before = self._add(stage.weights, end, before)
            if self.samples < end:
                break  # nothing is left for this stage, and the next one does not come early

    def source(self, sample: int) -> tuple[str, int]:
        """The part that a sample comes from, and how many rows that has given before."""
        part, count = self._place(sample)
        return self.names[part], count

    def row(self, sample: int) -> Row:
        """DataError behind the last sample."""
        part, count = self._place(sample)
        rows = self._parts[part].rows
        return rows[sample_index(self._seed + part, count, len(rows))]

    def counts(self, samples: int) -> dict[str, int]:
        """Rows that each part gives to the first `samples` samples."""
        return dict(zip(self.names, self._segment(samples).counts(samples), strict=True))

    def taken(self, samples: int) -> dict[str, Taken]:
        """What the first `samples` samples take of each part; of tokens as many as its rows have on average."""
        found = {}
        for part, (name, count) in zip(self._parts, self.counts(samples).items(), strict=True):
            epochs = count / len(part.rows)
            found[name] = Taken(count, round(epochs * part.tokens), epochs)
        return found

    @property
    def parts(self) -> dict[str, Part]:
        return dict(zip(self.names, self._parts, strict=True))

    def check(self, samples: int) -> None:
        """DataError unless there are so many samples."""
        if samples > self.samples:
            raise DataError(
                f"data.blend has {self.samples:,} rows of {self.length:,} tokens, and train.steps take {samples:,}: "
                "raise epochs in data.blend.parts, let more parts take part in the stage that ends there, leave the "
                "last stage's steps out, or lower train.steps."
            )

    def _place(self, sample: int) -> tuple[int, int]:
        self.check(sample + 1)
        segment = self._segment(sample)
        now, then = segment.counts(sample), segment.counts(sample + 1)
        part = next(part for part in range(len(now)) if then[part] > now[part])
        return part, now[part]

    def _segment(self, sample: int) -> _Segment:
        return self._segments[bisect_right(self._segments, sample, key=lambda segment: segment.first) - 1]

    def _add(self, weights: Mapping[str, float], end: int, before: tuple[int, ...]) -> tuple[int, ...]:
        """Adds a stage as segments, which end where a part has had all its epochs; returns the counts at its end."""
        if any(name not in self.names for name in weights) or sum(weights.values()) <= 0:
            raise DataError(
                f"data.blend has weights {dict(weights)}: give some of {', '.join(self.names)} a weight above 0."
            )
        while self.samples < end:
            room = [part.most_rows - count for part, count in zip(self._parts, before, strict=True)]
            # By rows: a row with much padding has few tokens.
            rates = [
                weights.get(name, 0) * len(part.rows) / part.tokens if left else 0.0
                for name, part, left in zip(self.names, self._parts, room, strict=True)
            ]
            if not sum(rates):
                break
            segment = _Segment(self.samples, _shares(rates), before)
            self._segments.append(segment)
            self.samples += min(end - self.samples, *(_last(segment.shares, i, left) for i, left in enumerate(room)))
            before = segment.counts(self.samples)
        return before


def _shares(rates: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of `rates`; at least 1 where the rate is not 0."""
    return tuple(max(1, round(rate / sum(rates) * _ONE)) if rate else 0 for rate in rates)


def _divide(samples: int, shares: Sequence[int]) -> list[int]:
    """Samples of each part among the first `samples`: one sample more is always one more of exactly one part.

    Each part in turn takes its share of what those before it left, rounded.
    """
    taken, left, rest = [], samples, sum(shares)
    for share in shares:
        count = (2 * left * share + rest) // (2 * rest) if share else 0
        taken.append(count)
        left, rest = left - count, rest - share
    return taken


def _last(shares: Sequence[int], part: int, room: int) -> int:
    """The largest number of samples of which a part has `room` at most."""
    low, high = 0, _FOREVER
    while low < high:
        middle = (low + high + 1) // 2
        if _divide(middle, shares)[part] <= room:
            low = middle
        else:
            high = middle - 1
    return low
