"""The learning rate at the steps where something begins or ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from farspan.trainer.schedule import learning_rate
from farspan.trainer.sections import OptimizerSection

PEAK = 2e-3


def rates(steps: int, **settings: object) -> list[float]:
    """The learning rate of every step; the first of the list stands for step 0, which no run takes."""
    section = OptimizerSection.model_validate({"learning_rate": PEAK, **settings})
    return [math.nan, *(learning_rate(section, step, steps) for step in range(1, steps + 1))]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_the_warm_up_rises_linearly_to_the_peak(schedule: str) -> None:
    rate = rates(110, schedule=schedule, warmup_steps=10)
    assert rate[1:11] == [pytest.approx(PEAK * step / 10, rel=1e-15) for step in range(1, 11)]
    assert rate[10] == PEAK
    assert rate[11] <= PEAK


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_without_a_warm_up_the_first_step_is_near_the_peak(schedule: str) -> None:
    assert 0.99 * PEAK < rates(100, schedule=schedule, warmup_steps=0)[1] <= PEAK


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_a_warm_up_longer_than_the_run_never_reaches_the_peak(schedule: str) -> None:
    assert rates(5, schedule=schedule, warmup_steps=10)[5] == PEAK / 2


def test_cosine_by_numbers() -> None:
    rate = rates(110, schedule="cosine", warmup_steps=10, final_fraction=0.1)
    assert rate[35] == pytest.approx(PEAK * (0.1 + 0.9 * (2 + math.sqrt(2)) / 4), rel=1e-12)
    assert rate[60] == pytest.approx(PEAK * 0.55, rel=1e-12)
    assert rate[110] == pytest.approx(PEAK * 0.1, rel=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rate[10:]))


def test_constant_stays() -> None:
    assert set(rates(50, schedule="constant", warmup_steps=3, final_fraction=0.0)[3:]) == {PEAK}


def test_wsd_by_numbers() -> None:
    """100 steps of which the last 20 decay: the knee is step 80, the last at the peak."""
    rate = rates(100, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    assert set(rate[10:81]) == {PEAK}
    assert rate[81] == pytest.approx(PEAK * (1 - 0.9 / 20), rel=1e-12)
    assert rate[90] == pytest.approx(PEAK * 0.55, rel=1e-12)
    assert rate[100] == pytest.approx(PEAK * 0.1, rel=1e-12)


def test_a_share_of_less_than_a_step_decays_in_the_last_one() -> None:
    rate = rates(3, schedule="wsd", decay_fraction=0.1, final_fraction=0.1)
    assert rate[1:] == [PEAK, PEAK, pytest.approx(PEAK / 10)]


@pytest.mark.parametrize(("final", "last"), [(0.0, 0.0), (1.0, PEAK)])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_step_has_the_final_fraction(schedule: str, final: float, last: float) -> None:
    rate = rates(40, schedule=schedule, warmup_steps=4, final_fraction=final)
    assert rate[40] == pytest.approx(last, abs=1e-18)
    assert min(rate[1:]) >= 0


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_a_run_of_one_step_has_a_rate(schedule: str) -> None:
    (rate,) = rates(1, schedule=schedule)[1:]
    assert rate == pytest.approx(PEAK if schedule == "constant" else PEAK / 10)


def test_resumed_runs_may_go_past_the_last_step() -> None:
    """A pure function of the step: no state, and no rise after the end."""
    settings = OptimizerSection(learning_rate=PEAK, schedule="cosine")  # type: ignore[call-arg]
    assert learning_rate(settings, 130, 100) == pytest.approx(PEAK / 10)
