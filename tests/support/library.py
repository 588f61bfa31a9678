"""A library's attention kernels, emulated on a CPU: exact, but every result of a call is rounded to the inputs' dtype.

Like cuDNN's and FlashAttention's, they compute full and causal rectangles and return out, dq, dk and dv of each in
bf16, for the caller to merge or add. Real ones refuse rows that travel, which `auto` then gives to Triton; this one
takes them too, so that no partial result escapes the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from farspan.kernels import accumulation_dtype
from farspan.kernels.backends import REGISTRY, reference
from farspan.kernels.backends.base import BackwardCall, ForwardCall
from farspan.kernels.problem import Problem


class RoundingLibrary:
    any_mask = False
    deterministic = True

    def __init__(self) -> None:
        self.calls = 0

    def refusal(self, problem: Problem) -> str | None:
        return None if problem.dtype == torch.bfloat16 else f"this library takes bf16, got {problem.dtype}"

    def attend(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        self.calls += 1
        work = accumulation_dtype(call.q.dtype)
        out, lse = reference.attend(replace(call, out_dtype=work, accumulate=None))
        return call.deliver(out.to(call.q.dtype), lse)

    def attend_backward(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        work = accumulation_dtype(call.q.dtype)
        gradients = reference.attend_backward(replace(call, out_dtype=work, accumulate=(None, None, None)))
        return call.deliver(tuple(x.to(call.q.dtype) for x in gradients))


@contextmanager
def rounding_library() -> Iterator[RoundingLibrary]:
    """In place of cuDNN, the backend "cudnn"."""
    library = RoundingLibrary()
    with patch.dict(REGISTRY, cudnn=library):
        yield library
