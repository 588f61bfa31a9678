"""The log line and the remaining time, to the letter."""

import math
from typing import Any

import pytest

from farspan.trainer.progress import Eta, format_line, format_seconds

COMMON: dict[str, Any] = {"learning_rate": 2e-5, "sequence_length": 2048, "tokens_per_second": 4131.6}


def test_the_line_says_everything() -> None:
    line = format_line(
        step=120, steps=5000, loss=2.31449, grad_norm=0.4099, step_seconds=1.2345, remaining_seconds=11550.0, **COMMON
    )
    assert line == (
        "step 120/5000 2.4% | loss 2.3145 | grad norm 0.41 | lr 2.00e-05 | 2,048 a row | 4,132 tokens/s"
        " | 1.2 s/step | eta 3h12m"
    )


def test_the_line_of_a_step_that_evaluates() -> None:
    line = format_line(
        step=50,
        steps=50,
        loss=2.0,
        eval_loss=2.5,
        grad_norm=12.345,
        step_seconds=0.0123,
        remaining_seconds=0.0,
        learning_rate=0.0,
        sequence_length=1_048_576,
        tokens_per_second=1_234_567.8,
    )
    assert line == (
        "step 50/50 100.0% | loss 2.0000 | eval loss 2.5000 | grad norm 12.35 | lr 0.00e+00 | 1,048,576 a row"
        " | 1,234,568 tokens/s | 0.012 s/step | eta 0s"
    )


def test_the_first_line_knows_no_eta_and_small_norms_keep_their_digits() -> None:
    line = format_line(
        step=1, steps=3, loss=9.0, grad_norm=0.00123, step_seconds=364.2, remaining_seconds=None, **COMMON
    )
    assert line == (
        "step 1/3 33.3% | loss 9.0000 | grad norm 1.23e-03 | lr 2.00e-05 | 2,048 a row | 4,132 tokens/s"
        " | 364.2 s/step | eta unknown"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (42, "42s"),
        (59.99, "59s"),
        (60, "1m00s"),
        (725, "12m05s"),
        (3599.99, "59m59s"),
        (3600, "1h00m"),
        (11579, "3h12m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (187200, "2d04h"),
        (8640000, "100d00h"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_format_seconds_refuses_what_is_no_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"given was {seconds}"):
        format_seconds(seconds)


def test_eta_leaves_out_the_first_step() -> None:
    eta = Eta()
    assert eta.remaining(10) is None
    eta.update(500.0)
    assert eta.remaining(10) is None
    eta.update(2.0)
    assert eta.remaining(10) == pytest.approx(20.0)
    for _ in range(100):
        eta.update(2.0)
    assert eta.remaining(10) == pytest.approx(20.0)
    assert eta.remaining(0) == 0.0


def test_eta_weighs_recent_steps_most() -> None:
    eta = Eta(smoothing=0.5)
    for seconds in (100.0, 1.0, 2.0, 4.0):
        eta.update(seconds)
    assert eta.remaining(7) == pytest.approx(7 * (4 * 4.0 + 2 * 2.0 + 1 * 1.0) / 7)


@pytest.mark.parametrize("smoothing", [0.0, -0.1, 1.1])
def test_eta_refuses_an_impossible_smoothing(smoothing: float) -> None:
    with pytest.raises(ValueError, match="smoothing is"):
        Eta(smoothing)
