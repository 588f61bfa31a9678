"""Tables of tokens by part and length: they have the sums that were asked for, or there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.mixing import MixingError, mix

TEXT = np.array([[10.0, 30.0, 60.0], [500.0, 100.0, 0.0]])


def test_without_a_mixture_parts_keep_their_lengths() -> None:
    table = mix(TEXT, np.array([3.0, 1.0]), None)
    assert table.sum(1).tolist() == pytest.approx([0.75, 0.25])
    assert table[0].tolist() == pytest.approx([0.075, 0.225, 0.45])
    assert table[1].tolist() == pytest.approx([0.25 * 5 / 6, 0.25 / 6, 0])


def test_with_a_mixture_both_sums_hold() -> None:
    table = mix(TEXT, np.array([1.0, 1.0]), np.array([2.0, 1.0, 1.0]))
    assert table.sum(1) == pytest.approx([0.5, 0.5], abs=1e-3)
    assert table.sum(0) == pytest.approx([0.5, 0.25, 0.25], abs=1e-12)
    assert table[1, 2] == 0


@given(
    st.integers(1, 5).flatmap(
        lambda parts: st.integers(1, 6).flatmap(
            lambda lengths: st.tuples(
                st.lists(
                    st.lists(st.floats(1, 1e9), min_size=lengths, max_size=lengths), min_size=parts, max_size=parts
                ),
                st.lists(st.floats(0.01, 1), min_size=parts, max_size=parts),
                st.lists(st.floats(0.01, 1), min_size=lengths, max_size=lengths),
            )
        )
    )
)
def test_parts_of_all_lengths_can_have_any_weights(given: tuple[list[list[float]], list[float], list[float]]) -> None:
    text, weights, mixture = (np.array(some) for some in given)
    table = mix(text, weights, mixture)
    assert table.sum(1) == pytest.approx(weights / weights.sum(), abs=1e-3)
    assert table.sum(0) == pytest.approx(mixture / mixture.sum(), abs=1e-9)
    # The nearest table to the text is the text times a factor for each part and one for each length.
    factors = np.log(table / text)
    assert factors - factors[:1] - factors[:, :1] + factors[0, 0] == pytest.approx(np.zeros_like(text), abs=1e-6)


def test_a_part_of_too_few_lengths_cannot_have_any_weight() -> None:
    """The second part has nothing of the longest, which is 60 % of the mixture."""
    with pytest.raises(MixingError) as error:
        mix(TEXT, np.array([1.0, 3.0]), np.array([0.2, 0.2, 0.6]))
    assert error.value.part == 1
    assert error.value.most == pytest.approx(0.4, abs=0.01)
