"""The one line a step that says everything, and the time that is left."""

import math


def format_line(
    *,
    step: int,
    steps: int,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    sequence_length: int,
    tokens_per_second: float,
    step_seconds: float,
    remaining_seconds: float | None,
    eval_loss: float | None = None,
) -> str:
    """The log line of one step.

        step 120/5000 2.4% | loss 2.3145 | grad norm 0.41 | lr 2.00e-05 | 2,048 a row | 4,132 tokens/s
        | 1.2 s/step | eta 3h12m

    Args:
        sequence_length: tokens in one row, over all ranks that share it.
        remaining_seconds: from `Eta.remaining`; None where nothing is known yet.
        eval_loss: shown after the loss on the steps that evaluate.
    """
    parts = [
        f"step {step}/{steps} {100 * step / steps:.1f}%",
        f"loss {loss:.4f}",
        *([] if eval_loss is None else [f"eval loss {eval_loss:.4f}"]),
        f"grad norm {_two_digits(grad_norm)}",
        f"lr {learning_rate:.2e}",
        f"{sequence_length:,} a row",
        f"{tokens_per_second:,.0f} tokens/s",
        f"{step_seconds:.1f} s/step" if step_seconds >= 1 else f"{step_seconds:.3f} s/step",
        "eta unknown" if remaining_seconds is None else f"eta {format_seconds(remaining_seconds)}",
    ]
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: 42s, 12m05s, 3h12m, 2d04h. The smaller unit is rounded down.

    Raises:
        ValueError: `seconds` is negative or not finite.
    """
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"A duration is a finite number of seconds from 0; given was {seconds}.")
    whole = int(seconds)
    for large, small, name, small_name in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= large:
            return f"{whole // large}{name}{whole % large // small:02d}{small_name}"
    return f"{whole}s"


class Eta:
    """The remaining time from an exponential moving average of step seconds.

    The first step after a start is left out: it compiles, warms up and fills caches. The average is corrected for its
    start, so that the second step already gives an unbiased estimate.

    Args:
        smoothing: the weight of the newest step, in (0, 1]; 0.05 looks back over about 20 steps.
    """

    def __init__(self, smoothing: float = 0.05) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing is {smoothing}; it must be above 0 and at most 1.")
        self._smoothing = smoothing
        self._warm = False
        self._sum = 0.0
        self._weight = 0.0

    def update(self, step_seconds: float) -> None:
        """Take in the wall-clock seconds of one more step."""
        if self._warm:
            self._sum += self._smoothing * (step_seconds - self._sum)
            self._weight += self._smoothing * (1 - self._weight)
        self._warm = True

    def remaining(self, steps_left: int) -> float | None:
        """Seconds for `steps_left` more steps; None until a second step was taken in."""
        if steps_left == 0:
            return 0.0
        return steps_left * self._sum / self._weight if self._weight else None


def _two_digits(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2e}"
