from collections import Counter

import numpy as np
import pytest

from farspan.data.sampling import Permutation, sample_index, shuffled


@pytest.mark.parametrize("size", [*range(1, 301), 10**6 + 3])
def test_it_is_a_bijection(size: int) -> None:
    permutation = Permutation(size, seed=size)
    seen = np.zeros(size, bool)
    for i in range(size):
        seen[permutation(i)] = True
    assert seen.all()


@pytest.mark.parametrize("size", [2, 3, 7, 10, 16, 17, 100])
@pytest.mark.parametrize("place", [0, 1])
def test_each_place_goes_everywhere_equally_often_over_the_seeds(size: int, place: int) -> None:
    trials = 200 * size
    counts = Counter(Permutation(size, seed)(place) for seed in range(trials))
    expected = trials / size
    chi_squared = sum((counts[target] - expected) ** 2 / expected for target in range(size))
    freedom = size - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_neighbours_do_not_stay_together() -> None:
    permutation = Permutation(10_000, seed=1)
    steps = np.diff([permutation(i) for i in range(10_000)])
    assert np.median(np.abs(steps)) > 2000
    assert np.mean(steps == 1) < 0.001


@pytest.mark.parametrize("place", [-1, 10])
def test_places_outside_are_refused(place: int) -> None:
    with pytest.raises(IndexError, match=r"range\(10\)"):
        Permutation(10, seed=0)(place)


def test_a_permutation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, seed=0)


def test_every_epoch_visits_everything_in_its_own_order() -> None:
    size = 50
    epochs = [[sample_index(9, epoch * size + i, size) for i in range(size)] for epoch in range(20)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    other_seed = [sample_index(10, i, size) for i in range(size)]
    assert other_seed != epochs[0]


def test_the_order_never_changes_between_versions() -> None:
    # Recorded once: a run that resumes under another Python, NumPy or Farspan must see the samples it would have seen.
    assert [sample_index(1234, sample, 1000) for sample in (0, 1, 2, 999, 1000, 123456789)] == [
        610,
        688,
        400,
        605,
        193,
        482,
    ]
    assert shuffled(10, 1234).tolist() == [5, 6, 3, 9, 7, 4, 1, 2, 8, 0]


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_shuffled_has_every_number_once_by_seed(size: int) -> None:
    order = shuffled(size, 5)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == shuffled(size, 5).tolist()
    if size == 1000:
        assert order.tolist() != shuffled(size, 6).tolist()
