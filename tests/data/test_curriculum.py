"""The curriculum over lengths: constant tokens, no row twice, order by the odds, published statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from farspan.data.curriculum import ODDS, Curriculum, Schedule, average_context, average_length
from farspan.data.quotas import Quotas
from farspan.data.rows import Row
from farspan.data.steps import Epochs


@dataclass(frozen=True)
class Numbered:
    """Rows whose first two tokens say which they are."""

    length: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Row:
        tokens = np.zeros(self.length, np.int64)
        tokens[:2] = self.length, row
        return Row(tokens, tokens, np.array([0, self.length]), np.arange(self.length), self.length)


COUNTS = {8: 512, 16: 200, 32: 128, 64: 32}  # steps of 128 tokens: 32, 25, 32 and 16


def curriculum(
    odds: str = "grow_p2", cycle_steps: int = 35, schedule: Schedule = "random", seed: int = 3, counts: dict = COUNTS
) -> Curriculum:
    buckets = [Epochs(Numbered(length, count), seed + length) for length, count in counts.items()]
    shares = [float(length * count) for length, count in counts.items()]
    return Curriculum(buckets, Quotas({0: shares}, cycle_steps), ODDS[odds](len(buckets)), 128, schedule, seed)


@pytest.mark.parametrize(("odds", "schedule"), list(product(ODDS, ("random", "sub_cycles"))))
def test_every_step_has_the_same_tokens_of_one_length(odds: str, schedule: Schedule) -> None:
    steps = curriculum(odds, schedule=schedule)
    taken: set[int] = set()
    for step in range(150):
        samples = steps.samples(step)
        assert len(samples) * steps.length(step) == 128
        assert {len(steps.row(sample).tokens) for sample in samples} == {steps.length(step)}
        assert not taken & set(samples)
        taken |= set(samples)
    assert steps.length(0) == 64
    assert steps.lengths_of_steps(150).tolist() == [steps.length(step) for step in range(150)]


@pytest.mark.parametrize("odds", ["uniform", "grow_p100"])
def test_no_row_comes_twice_before_all_have_come(odds: str) -> None:
    """105 steps are one epoch of all buckets, in three cycles."""
    steps = curriculum(odds)
    seen = Counter(tuple(steps.row(n).tokens[:2].tolist()) for step in range(105) for n in steps.samples(step))
    assert set(seen.values()) == {1}
    assert Counter(length for length, _ in seen) == COUNTS


def test_the_mixture_does_not_depend_on_the_odds() -> None:
    mixtures = [Counter(curriculum(odds).lengths_of_steps(35).tolist()) for odds in ODDS]
    assert all(mixture == mixtures[0] for mixture in mixtures)
    wanted = {length: 35 * count * length / 13440 for length, count in COUNTS.items()}
    assert all(abs(mixtures[0][length] - wanted[length]) < 1.001 for length in COUNTS)


def test_whole_steps_follow_the_shares_cycle_by_cycle() -> None:
    """A bucket with less than a step a cycle has one in some cycles; the longest has the first of all."""
    steps = curriculum(cycle_steps=5, counts={8: 1600, 16: 799, 32: 400, 64: 4})
    wanted = np.array([1600 * 8, 799 * 16, 400 * 32, 4 * 64]) / (1600 * 8 + 799 * 16 + 400 * 32 + 4 * 64)
    for cycle in range(1, 300):
        before = steps.quotas.steps_before(cycle)
        assert before.sum() == 5 * cycle
        assert (before >= steps.quotas.steps_before(cycle - 1)).all()
        assert np.abs(before - 5 * cycle * wanted).max() < 2
    assert steps.quotas.steps_before(1)[-1] == 1


@pytest.mark.parametrize("odds", ["uniform", "grow_linear", "grow_p2"])
def test_buckets_are_drawn_by_their_odds(odds: str) -> None:
    """While all buckets last, which is in the first tenth of a cycle, counts are those of independent draws."""
    steps = curriculum(odds, cycle_steps=20_000, counts={8: 1600, 16: 800, 32: 400, 64: 200})
    drawn = steps.lengths_of_steps(2_000)[1:]
    chances = np.array(ODDS[odds](4)) / sum(ODDS[odds](4))
    for length, chance in zip((8, 16, 32, 64), chances):
        deviation = np.sqrt(len(drawn) * chance * (1 - chance))
        assert abs((drawn == length).sum() - len(drawn) * chance) < 3 * deviation


def test_rows_grow_in_every_cycle_and_shrink_where_asked() -> None:
    for odds, sign in (("grow_p2", 1), ("grow_p100", 1), ("shrink_p100", -1)):
        lengths = curriculum(odds, cycle_steps=1000).lengths_of_steps(3000)
        for cycle in range(3):
            quarters = lengths[1000 * cycle + 1 : 1000 * (cycle + 1)][:996].reshape(4, -1).mean(1)
            assert sign * (quarters[3] - quarters[0]) > 10


def test_sub_cycles_have_the_shares_of_the_published_schedule() -> None:
    """63 steps of each of six buckets: the table of OLMo-core's Grow-P2."""
    table = [
        [32, 16, 8, 4, 2, 1],
        [16, 32, 8, 4, 2, 1],
        [8, 16, 32, 4, 2, 1],
        [4, 8, 16, 32, 2, 1],
        [2, 4, 8, 16, 32, 1],
        [1, 2, 4, 8, 16, 32],
    ]
    lengths = [4, 8, 16, 32, 64, 128]
    steps = curriculum(schedule="sub_cycles", cycle_steps=6 * 63, counts={length: 512 // length for length in lengths})
    found = steps.lengths_of_steps(2 * 6 * 63)[6 * 63 :]  # of the second cycle: the first begins with the longest
    begin = 0
    for part in range(6):
        end = begin + sum(row[part] for row in table)
        assert [Counter(found[begin:end].tolist())[length] for length in lengths] == [row[part] for row in table]
        begin = end


@pytest.mark.parametrize("schedule", ["random", "sub_cycles"])
def test_the_order_is_a_function_of_seed_and_step(schedule: Schedule) -> None:
    """A curriculum that is asked for late steps first, as after a resume, says the same; another seed another."""
    whole, late = curriculum(schedule=schedule), curriculum(schedule=schedule)
    for step in (140, 3, 77):
        assert late.samples(step) == whole.samples(step)
        for sample in late.samples(step):
            assert np.array_equal(late.row(sample).tokens, whole.row(sample).tokens)
    other = curriculum(schedule=schedule, seed=4)
    assert other.lengths_of_steps(100).tolist() != whole.lengths_of_steps(100).tolist()


def test_published_mixtures() -> None:
    """Shares of 2^6 to 2^13 in 96ths, and >= 256 as 16 of each from 2^8 on; Table 1 of arXiv:2405.13226."""

    def figures(first: int, shares: list[int]) -> tuple[int, int]:
        tokens = {2 ** (first + i): float(share) for i, share in enumerate(shares)}
        return round(average_length(tokens)), round(average_context(tokens))

    assert figures(6, [3, 6, 10, 17, 21, 17, 13, 9]) == (482, 1018)
    assert figures(6, [12] * 8) == (257, 1020)
    assert figures(10, [96]) == (1024, 512)
    assert figures(6, [16] * 6) == (195, 336)
    assert figures(8, [16] * 6) == (780, 1344)


def test_the_published_helper_for_dclm() -> None:
    """28,795,904,000 tokens in 8 epochs on 8 GPUs: shards of 2^20 tokens a worker and epoch, and weights by Grow-P2.

    From the rounded sizes of the buckets the helper's last number comes out as 59, and all others as published.
    """
    tokens = [3.733, 6.287, 7.770, 6.615, 5.408, 4.732]
    published = np.array([46, 78, 97, 82, 67, 60])
    buckets = [Epochs(Numbered(2**k, 1), 0) for k in range(8, 14)]
    steps = Curriculum(buckets, Quotas({0: tokens}, 429), ODDS["grow_p2"](6), 2**23, "random", 0)
    shards = np.rint(steps.quotas.shares[0] * 28_795_904_000 / 8 / 2**23).astype(int)
    assert (published - shards).tolist() == [0, 0, 0, 0, 0, 1]
    assert np.abs(steps.quotas.steps_before(1) - shards).max() <= 1
    assert (published * ODDS["grow_p2"](6)).tolist() == [1472, 1248, 776, 328, 134, 60]
