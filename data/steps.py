"""Which samples each optimizer step takes, and how they are dealt out to ranks.

Rows are made by a `RowSource`; a `SampleStream` says which row each sample of a run is, without end; `Steps` say which
samples a step takes, and how long its rows are. All are pure functions of a seed: ranks and workers only slice them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from farspan.data.rows import Row, RowSource
from farspan.data.sampling import sample_index


class SampleStream(Protocol):
    """A row of one length for every sample number from 0 on, without end: rows of a source, or a blend of several."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def row(self, sample: int) -> Row: ...


class Steps(Protocol):
    """All samples of each optimizer step, over all ranks; steps count from 0."""

    @property
    def lengths(self) -> Sequence[int]:
        """The lengths of rows that occur, longest first."""

    def length(self, step: int) -> int:
        """Tokens of each of a step's rows."""

    def samples(self, step: int) -> Sequence[int]:
        """The numbers of a step's samples, which no other step has."""

    def row(self, sample: int) -> Row: ...


@dataclass(frozen=True)
class Epochs:
    """The rows of a source, each once in every epoch, which has an order of its own."""

    rows: RowSource
    seed: int

    @property
    def length(self) -> int:
        return self.rows.length

    def row(self, sample: int) -> Row:
        return self.rows[sample_index(self.seed, sample, len(self.rows))]


@dataclass(frozen=True)
class FixedSteps:
    """Steps of equally many rows of one stream: step s has samples `[s * rows_per_step, (s + 1) * rows_per_step)`."""

    stream: SampleStream
    rows_per_step: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.stream.length,)

    def length(self, step: int) -> int:
        return self.stream.length

    def samples(self, step: int) -> range:
        return range(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def row(self, sample: int) -> Row:
        return self.stream.row(sample)


def deal(samples: Sequence[int], micro_batch_rows: int, data: int, data_rank: int) -> list[Sequence[int]]:
    """The micro-batches of one of `data` data ranks, in order: consecutive samples go to micro-batches, and in each to
    data ranks. `samples` must be a multiple of `micro_batch_rows * data`."""
    at_once = micro_batch_rows * data
    if len(samples) % at_once:
        raise ValueError(f"{len(samples)} samples are no multiple of {micro_batch_rows} x {data} data ranks")
    firsts = range(data_rank * micro_batch_rows, len(samples), at_once)
    return [samples[first : first + micro_batch_rows] for first in firsts]
