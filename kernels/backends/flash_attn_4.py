"""FlashAttention-4 (PyPI `flash-attn-4`, the extra `farspan[fa4]`): CuTe kernels for Hopper and Blackwell."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from farspan.kernels.backends.base import Accumulated, deliver, deliver_gradients
from farspan.kernels.masks import IntervalMask
from farspan.kernels.problem import Problem
from farspan.kernels.tiles import TileMap

any_mask = False


def refusal(problem: Problem) -> str | None:
    if not _installed():
        return "flash_attn_4 is not installed (pip install 'farspan[fa4]')"
    if problem.capability is None or problem.capability < (9, 0):
        return "flash_attn_4 needs a GPU of compute capability 9.0 or newer"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"flash_attn_4 takes bf16 and fp16, got {problem.dtype}"
    dim, value_dim = problem.head_dim, problem.value_dim
    if dim != value_dim or dim % 8 or dim > 128:
        return f"flash_attn_4 takes one head dim, a multiple of 8 up to 128, got {dim} and {value_dim}"
    if not problem.out_given:
        return "flash_attn_4 computes delta itself and needs the global out, which rows that travel leave behind"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    out_dtype: torch.dtype,
    accumulate: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    causal = TileMap.of(mask, k.shape[1]).offset != k.shape[1]
    out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return deliver(out, lse, out_dtype, accumulate)


def attend_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    assert out is not None, "see refusal"
    causal = TileMap.of(mask, k.shape[1]).offset != k.shape[1]
    gradients = _flash_attn_bwd(
        q, k, v, out, dout.contiguous(), lse.contiguous(), softmax_scale=scale, causal=causal, deterministic=True
    )
    return deliver_gradients(gradients[:3], out_dtype, accumulate)


@cache
def _installed() -> bool:
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
