"""Blends: shares are kept at every sample, caps hold, stages follow each other, and all of it is a formula."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.blend import Blend, Part, Stage, Taken
from farspan.data.errors import DataError
from farspan.data.rows import Row, blank_row

LENGTH = 8


@dataclass
class Numbers:
    """Rows that say which ones they are."""

    count: int
    length: int = LENGTH
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Row:
        self.asked.append(row)
        return blank_row(self.length)


def part(rows: int, epochs: float | None = None, filled: float = 1.0) -> Part:
    return Part(Numbers(rows), int(rows * LENGTH * filled), epochs)


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=7),
    start=st.integers(0, 1 << 40),
)
def test_every_sample_is_one_row_of_one_part(weights: list[float], start: int) -> None:
    blend = Blend({str(i): part(10) for i in range(len(weights))}, [Stage(None, dict(enumerated(weights)))], 0)
    before = blend.counts(start)
    assert sum(before.values()) == start
    for sample in range(start, start + 40):
        name, place = blend.source(sample)
        after = blend.counts(sample + 1)
        assert place == before[name]
        assert after == {**before, name: place + 1}
        before = after


def enumerated(weights: list[float]) -> list[tuple[str, float]]:
    return [(str(number), weight) for number, weight in enumerate(weights)]


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=7), st.integers(1, 3000))
def test_parts_are_never_far_from_their_shares(weights: list[float], samples: int) -> None:
    blend = Blend({str(i): part(10) for i in range(len(weights))}, [Stage(None, dict(enumerated(weights)))], 0)
    counts = blend.counts(samples)
    for name, weight in enumerated(weights):
        assert abs(counts[name] - samples * weight / sum(weights)) < 2


def test_weights_are_those_of_tokens() -> None:
    """Rows of `thin` are half padding, so that it takes two of them for one of `full`."""
    blend = Blend({"full": part(10), "thin": part(10, filled=0.5)}, [Stage(None, {"full": 1, "thin": 1})], 0)
    assert blend.counts(3000) == {"full": 1000, "thin": 2000}


def test_a_part_takes_each_of_its_rows_once_an_epoch() -> None:
    parts = {"a": part(7), "b": part(30)}
    blend = Blend(parts, [Stage(None, {"a": 1, "b": 3})], 5)
    for sample in range(4 * 21):
        blend.row(sample)
    asked = {name: each.rows.asked for name, each in parts.items() if isinstance(each.rows, Numbers)}
    assert blend.counts(84) == {name: len(rows) for name, rows in asked.items()} == {"a": 21, "b": 63}
    assert blend.taken(84) == {"a": Taken(21, 21 * LENGTH, 3), "b": Taken(63, 63 * LENGTH, 2.1)}
    epochs = [tuple(asked["a"][first : first + 7]) for first in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert set(Counter(asked["b"][:60]).values()) == {2}


def test_a_part_that_has_had_its_epochs_leaves_its_share_to_the_others() -> None:
    parts = {"a": part(10, epochs=1.5), "b": part(100), "c": part(100)}
    blend = Blend(parts, [Stage(None, {"a": 2, "b": 1, "c": 1})], 0)
    assert blend.counts(30) == {"a": 15, "b": 8, "c": 7} or blend.counts(30) == {"a": 15, "b": 7, "c": 8}
    after = blend.counts(430)
    assert after["a"] == 15
    assert abs(after["b"] - after["c"]) <= 2


def test_stages_follow_each_other_and_parts_go_on_where_they_were() -> None:
    stages = [Stage(40, {"short": 1}), Stage(40, {"short": 1, "long": 3}), Stage(None, {"long": 1})]
    blend = Blend({"short": part(1000), "long": part(1000)}, stages, 0)
    assert blend.counts(40) == {"short": 40, "long": 0}
    assert blend.counts(80) == {"short": 50, "long": 30}
    assert blend.counts(100) == {"short": 50, "long": 50}
    places: Counter[str] = Counter()
    for sample in range(120):
        name, place = blend.source(sample)
        assert place == places[name]
        places[name] += 1


def test_a_blend_ends_where_all_have_had_their_epochs() -> None:
    blend = Blend({"a": part(10, 2), "b": part(5, 1)}, [Stage(None, {"a": 1, "b": 1})], 0)
    assert blend.samples == 25
    blend.check(25)
    assert blend.counts(25) == {"a": 20, "b": 5}
    with pytest.raises(DataError, match=r"data.blend has 25 rows of 8 tokens, and train.steps take 26: raise epochs"):
        blend.check(26)
    with pytest.raises(DataError, match="has 25 rows"):
        blend.row(25)
    staged = Blend({"a": part(10), "b": part(5)}, [Stage(6, {"a": 1}), Stage(4, {"b": 1})], 0)
    assert staged.samples == 10
    short = Blend({"a": part(10, 1), "b": part(5)}, [Stage(20, {"a": 1}), Stage(None, {"b": 1})], 0)
    assert short.samples == 10  # the second stage does not come early


def test_epochs_that_are_less_than_one_row_are_refused() -> None:
    parts = {"a": part(9, epochs=0.1), "b": part(100)}
    with pytest.raises(
        DataError, match=r"data.blend.parts.a.epochs 0.1 of 9 rows of 8 tokens is less than one row: ra"
    ):
        Blend(parts, [Stage(None, {"a": 1, "b": 1})], 0)
    Blend({"a": part(10, epochs=0.1)}, [Stage(None, {"a": 1})], 0)


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"c": 1.0}])
def test_a_stage_needs_a_part_with_a_weight(weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"data.blend has weights .*: give some of a, b a weight above 0"):
        Blend({"a": part(1), "b": part(1)}, [Stage(None, weights)], 0)


def test_rows_of_different_lengths_do_not_blend() -> None:
    with pytest.raises(ValueError, match="rows of one length"):
        Blend({"a": part(1), "b": Part(Numbers(1, 16), 16)}, [Stage(None, {"a": 1})], 0)


def test_the_order_of_a_part_depends_on_the_seed() -> None:
    orders = []
    for seed in (1, 1, 2):
        parts = {"a": part(50)}
        blend = Blend(parts, [Stage(None, {"a": 1})], seed)
        for sample in range(50):
            blend.row(sample)
        rows = parts["a"].rows
        assert isinstance(rows, Numbers)
        orders.append(rows.asked)
    assert orders[0] == orders[1] != orders[2]
    assert np.array_equal(np.sort(orders[2]), np.arange(50))
