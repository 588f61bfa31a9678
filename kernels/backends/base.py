"""What every backend is: two functions, each of one call, and a word on what it can compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.index import Selection
from farspan.kernels.masks import IntervalMask
from farspan.kernels.merge import merge_into
from farspan.kernels.problem import Problem
from farspan.kernels.tiles import TileMap


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """The arguments of `farspan.kernels.attend`, checked and with their defaults set."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: IntervalMask
    index: Selection | None
    scale: float
    out_dtype: torch.dtype
    accumulate: tuple[Tensor, Tensor] | None

    def deliver(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """For a backend that makes its own result: that result, or what it was merged into."""
        if self.accumulate is None:
            return out.to(self.out_dtype), lse
        merge_into(*self.accumulate, out, lse)
        return self.accumulate


@dataclass(frozen=True, eq=False)
class BackwardCall:
    """The arguments of `farspan.kernels.attend_backward`, checked and with their defaults set."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    lse: Tensor
    delta: Tensor
    mask: IntervalMask
    index: Selection | None
    scale: float
    out_dtype: torch.dtype
    accumulate: tuple[Tensor | None, Tensor | None, Tensor | None]

    def deliver(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """For a backend that makes its own gradients: each as it is, or added to the total that was given for it."""
        dq, dk, dv = (
            gradient.to(self.out_dtype) if total is None else total.add_(gradient)
            for gradient, total in zip(gradients, self.accumulate, strict=True)
        )
        return dq, dk, dv


def is_causal(call: ForwardCall | BackwardCall) -> bool:
    """Of a call over a rectangle, whether it is causal, and not full."""
    keys = call.k.shape[1]
    return TileMap.of(call.mask, keys).offset != keys


class Backend(Protocol):
    """A module or an object that computes attention."""

    any_mask: bool
    """Whether every interval mask can be computed, or only rectangles: full ones, and causal ones that are square."""
    deterministic: bool
    """Whether gradients repeat bit for bit; results of the forward pass always do."""
    plans_shapes: bool
    """Whether the first call with a shape takes a tenth of a second, in which the library makes a plan for it."""

    def refusal(self, problem: Problem) -> str | None:
        """Why such tensors cannot be taken, whatever the mask; None if they can."""

    def attend(self, call: ForwardCall) -> tuple[Tensor, Tensor]: ...

    def attend_backward(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]: ...
