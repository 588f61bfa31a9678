"""FlashAttention-4 (PyPI `flash-attn-4`, the extra `farspan[fa4]`): CuTe kernels for Hopper and Blackwell."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from farspan.kernels.backends.base import BackwardCall, ForwardCall, is_causal
from farspan.kernels.problem import Problem

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


def attend(call: ForwardCall) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    given = {"softmax_scale": call.scale, "causal": is_causal(call)}
    out, lse, *_ = _flash_attn_fwd(call.q, call.k, call.v, **given, return_lse=True)
    return call.deliver(out, lse)


def attend_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    assert call.out is not None, "see refusal"
    given = {"softmax_scale": call.scale, "causal": is_causal(call), "deterministic": True}
    dout, lse = call.dout.contiguous(), call.lse.contiguous()
    return call.deliver(_flash_attn_bwd(call.q, call.k, call.v, call.out, dout, lse, **given)[:3])


@cache
def _installed() -> bool:
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
