from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
from step_measure import LONG, WARM_UP_LENGTH, Split, Stopwatch, measure, model_flops
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.models.config import ModelConfig


class _Slow(torch.autograd.Function):
    """Twice its input, after a while in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.1)
        return gradient * 2


def test_the_split_counts_both_directions_and_recomputation() -> None:
    owner = SimpleNamespace(slow=lambda x: _Slow.apply(x), step=lambda: time.sleep(0.03))
    before = owner.slow
    x = torch.ones(3, requires_grad=True)
    with Split(torch.device("cpu")) as split:
        split.forward_and_backward(owner, "slow", "attention")
        split.call(owner, "step", "optimizer")
        checkpoint(lambda y: owner.slow(y).exp(), x * 3, use_reentrant=False).sum().backward()
        owner.step()
        seconds = split.seconds()
    assert owner.slow is before
    # Forward, once more for the recomputation, and backward.
    assert seconds["attention"] >= 0.2
    assert seconds["optimizer"] >= 0.03


def test_model_flops_are_those_of_the_matrix_products() -> None:
    model = ModelConfig(
        vocabulary_size=50, hidden_size=8, layers=3, heads=4, kv_heads=2, head_dim=2, feed_forward_size=10
    )
    length = 7
    linear = length * 2 * (3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 10) + 50 * 8)
    attention = 3 * 4 * (2 + 2) * 2 * sum(range(1, length + 1))
    assert model_flops(model, length) == 3 * (linear + attention)


class _Trainee:
    parameters = 0

    def __init__(self) -> None:
        self.ran: list[tuple[int, int]] = []

    def steps(self, length: int, count: int, stopwatch: Stopwatch) -> float:
        self.ran.append((length, count))
        stopwatch.start()
        for _ in range(count):
            time.sleep(0.01)
            stopwatch.lap()
        return 2.5

    def warm_up(self, length: int) -> None:
        self.ran.append((WARM_UP_LENGTH, 2))

    def watch(self, split: Split) -> None:
        split.call(self, "steps", "optimizer")


def test_long_rows_are_warmed_up_short_and_run_once() -> None:
    trainee = _Trainee()
    found = measure(trainee, 1024, 3, torch.device("cpu"))
    assert trainee.ran == [(1024, 1), (1024, 3), (1024, 1)]
    assert found.seconds >= 0.01
    assert found.loss == 2.5

    trainee = _Trainee()
    found = measure(trainee, LONG + 1, 3, torch.device("cpu"))
    assert trainee.ran == [(WARM_UP_LENGTH, 2), (LONG + 1, 1)]
    assert found.parts["optimizer"] >= found.seconds
