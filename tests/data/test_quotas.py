"""Steps of each bucket by cycle: whole, near the shares of each stage, and none where a stage has no share."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.quotas import Quotas


@given(
    st.integers(1, 6).flatmap(
        lambda buckets: st.lists(
            st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 7.0]), min_size=buckets, max_size=buckets).filter(any),
            min_size=1,
            max_size=3,
        )
    ),
    st.integers(1, 40),
)
def test_stages_have_their_own_shares(shares: list[list[float]], cycle_steps: int) -> None:
    quotas = Quotas({4 * stage: some for stage, some in enumerate(shares)}, cycle_steps)
    for stage, some in enumerate(shares):
        first = quotas.steps_before(4 * stage)
        for cycle in range(4 * stage + 1, 4 * stage + 5):
            taken = quotas.steps_before(cycle) - first
            assert taken.sum() == (cycle - 4 * stage) * cycle_steps
            assert not taken[np.array(some) == 0].any()
            wanted = np.array(some) / sum(some) * taken.sum()
            # The first step of all is of the longest bucket.
            assert (np.abs(taken - wanted) < (2 if stage == 0 else 1) + 1e-9).all()
    assert quotas.steps_before(1)[np.flatnonzero(shares[0])[-1]] > 0
