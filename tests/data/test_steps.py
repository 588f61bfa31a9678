"""Which samples steps take, and how data ranks share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from farspan.data.concatenated import ConcatRows
from farspan.data.corpus import Corpus
from farspan.data.steps import Epochs, FixedSteps, deal


@pytest.fixture
def rows(corpus_of: Callable[[Sequence[Sequence[int]]], Corpus]) -> ConcatRows:
    """Eleven rows of 8 tokens that are all different."""
    return ConcatRows(corpus_of([range(start, min(start + 13, 90)) for start in range(0, 90, 13)]), 8, seed=1)


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
@pytest.mark.parametrize("data", [1, 2, 4])
def test_data_ranks_take_slices_of_one_sequence_of_samples(rows: ConcatRows, data: int, micro_batch_rows: int) -> None:
    steps = FixedSteps(Epochs(rows, seed=6), rows_per_step=8)
    taken = []
    for step in range(5):
        by_rank = [deal(steps.samples(step), micro_batch_rows, data, rank) for rank in range(data)]
        assert {len(micro_batches) for micro_batches in by_rank} == {8 // (data * micro_batch_rows)}
        taken += [sample for at_once in zip(*by_rank) for samples in at_once for sample in samples]
    assert taken == list(range(40))


def test_samples_that_do_not_go_round_are_refused() -> None:
    with pytest.raises(ValueError, match="6 samples are no multiple of 1 x 4 data ranks"):
        deal(range(6), 1, 4, 0)


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own(rows: ConcatRows) -> None:
    stream, size = Epochs(rows, seed=6), len(rows)
    epochs = [[int(stream.row(epoch * size + i).tokens[0]) for i in range(size)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(int(rows[i].tokens[0]) for i in range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Epochs(rows, seed=7)
    assert [int(other.row(i).tokens[0]) for i in range(size)] != epochs[0]
