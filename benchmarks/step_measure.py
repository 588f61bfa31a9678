"""Seconds, memory and the split of an optimizer step, measured alike for whoever trains."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest.mock import patch

import torch

from farspan.models.config import ModelConfig

PEAK_FLOPS = 989e12  # bf16 matrix products of an H100 or H200, dense, by the data sheet
# Rows longer than this are warmed up at WARM_UP_LENGTH and timed once: their steps take minutes.
LONG = 131_072
WARM_UP_LENGTH = 8192


class Trainee(Protocol):
    """Who trains: a framework with a model of `parameters` weights."""

    parameters: int
    further: dict[str, float]
    """What else is known of its steps, for the row of results."""

    def steps(self, length: int, count: int, stopwatch: Stopwatch) -> float:
        """Runs optimizer steps over rows of `length` tokens, `stopwatch.lap()` after each; returns the last loss."""

    def warm_up(self, length: int) -> None:
        """Does once, on short rows, what a first step over `length` tokens would spend time on and no later one."""

    def watch(self, split: Split) -> None:
        """Tells `split` which functions are attention, loss and optimizer."""


class Stopwatch:
    """Seconds of each step, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def start(self) -> None:
        self._last = self._now()

    def lap(self) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Split:
    """Device seconds between the beginning and the end of chosen functions, while the context is entered.

    Events are recorded on the stream and read at the end, so that nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._patches = ExitStack()

    def __enter__(self) -> Split:
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def call(self, owner: object, name: str, part: str) -> None:
        """Counts calls of `owner.name` towards `part`."""

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                begin = self._mark()
                result = function(*args, **kwargs)
                self._spans.append((part, begin, self._mark()))
                return result

            return timed

        self._replace(owner, name, make)

    def forward_and_backward(self, owner: object, name: str, part: str) -> None:
        """Counts calls of a differentiable function, and the way of the gradient from its result to its input."""

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                begin = self._mark()
                result = function(*args, **kwargs)
                self._spans.append((part, begin, self._mark()))
                self._time_gradient(_differentiable((*args, *kwargs.values())), _differentiable((result,)), part)
                return result

            return timed

        self._replace(owner, name, make)

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for part, begin, end in self._spans:
            spent = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            total[part] = total.get(part, 0.0) + spent
        return total

    def _time_gradient(self, source: torch.Tensor | None, result: torch.Tensor | None, part: str) -> None:
        if source is None or result is None:  # a forward pass without a graph, to be recomputed with one
            return
        arrived: list[Any] = []

        def leave(_: torch.Tensor) -> None:
            # Of a call that recomputed, nothing arrives at the result; its source may be the first call's own.
            if arrived:
                self._spans.append((part, arrived.pop(), self._mark()))

        result.register_hook(lambda _: arrived.append(self._mark()))
        source.register_hook(leave)

    def _replace(self, owner: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._patches.enter_context(patch.object(owner, name, make(getattr(owner, name))))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _differentiable(values: Any) -> torch.Tensor | None:
    """The first tensor that a gradient passes through."""
    for value in values:
        if isinstance(value, tuple):
            value = _differentiable(value)
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            return value
    return None


@dataclass
class Measurement:
    """Of one length; `parts` are seconds of attention, loss and optimizer, the rest is other compute."""

    length: int
    seconds: float
    peak_bytes: int
    loss: float
    parts: dict[str, float] = field(default_factory=dict)


def measure(trainee: Trainee, length: int, steps: int, device: torch.device) -> Measurement:
    """The median of `steps` steps after one that warms up; the split comes from one more step.

    Of a row longer than `LONG` one step is run, split and all: recording its events takes no time that shows.
    """
    is_long = length > LONG
    if is_long:
        trainee.warm_up(length)
    else:
        trainee.steps(length, 1, Stopwatch(device))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timed, extra = Stopwatch(device), Stopwatch(device)
    loss = 0.0
    if not is_long:
        loss = trainee.steps(length, steps, timed)
    with Split(device) as split:
        trainee.watch(split)
        if is_long:
            loss = trainee.steps(length, 1, timed)
        else:
            trainee.steps(length, 1, extra)
        parts = split.seconds()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Measurement(length, statistics.median(timed.seconds), peak, loss, parts)


def model_flops(model: ModelConfig, length: int) -> float:
    """Of forward and backward pass over one causal row, without recomputation; docs/benchmarks.md derives it."""
    assert model.vocabulary_size is not None
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = model.hidden_size * (2 * query + 2 * key + 3 * model.feed_forward_size)
    matrices = model.layers * layer + model.vocabulary_size * model.hidden_size
    pairs = length * (length + 1) / 2
    return 6.0 * matrices * length + 12.0 * model.layers * query * pairs
