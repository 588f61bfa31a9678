"""What every backend is: two functions and a word on what it can compute."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.masks import IntervalMask
from farspan.kernels.merge import merge_into
from farspan.kernels.problem import Problem

Accumulated = tuple[Tensor | None, Tensor | None, Tensor | None]


class Backend(Protocol):
    """Arguments are those of `farspan.kernels.attend` and `attend_backward`, checked and with their defaults set."""

    any_mask: bool
    """Whether every interval mask can be computed, or only rectangles: full ones, and causal ones that are square."""

    def refusal(self, problem: Problem) -> str | None:
        """Why such tensors cannot be taken, whatever the mask; None if they can."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        out_dtype: torch.dtype,
        accumulate: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]: ...

    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor,
        mask: IntervalMask,
        scale: float,
        out_dtype: torch.dtype,
        accumulate: Accumulated,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def deliver(
    out: Tensor, lse: Tensor, out_dtype: torch.dtype, accumulate: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """For a backend that makes its own result: that result, or what it was merged into."""
    if accumulate is None:
        return out.to(out_dtype), lse
    merge_into(*accumulate, out, lse)
    return accumulate


def deliver_gradients(
    gradients: tuple[Tensor, ...], out_dtype: torch.dtype, accumulate: Accumulated
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for gradients: each is new, or has been added to the total that was given for it."""
    dq, dk, dv = (
        gradient.to(out_dtype) if total is None else total.add_(gradient)
        for gradient, total in zip(gradients, accumulate, strict=True)
    )
    return dq, dk, dv
