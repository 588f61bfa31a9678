"""Tensors as the kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_in_steps_of_16_bytes(x: Tensor) -> Tensor:
    """x itself, or a copy where its rows do not lie as the hardware's tensor loads need them."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step * x.itemsize % 16 == 0 for step in steps)
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def last_contiguous(x: Tensor) -> Tensor:
    """x itself, or a copy whose last stride is 1: also where that dim has size 1, which torch calls contiguous."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def strided(x: Tensor, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """A tensor, and the strides of some of its dims; the last must be 1, and what is written can't be a copy."""
    if x.stride(-1) != 1:
        raise ValueError(f"what attention accumulates into must be contiguous in its last dim, got {x.stride()}")
    return (x, *(x.stride(dim) for dim in dims))


def new_or(x: Tensor, dtype: torch.dtype, accumulate: Tensor | None) -> Tensor:
    """What a gradient is added into, or a new tensor of x's shape for it."""
    if accumulate is not None:
        return accumulate
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
