"""FlashAttention-4 (PyPI `flash-attn-4`, the extra `farspan[fa4]`): CuTe kernels for Hopper and Blackwell."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from farspan.kernels.backends.base import BackwardCall, ForwardCall, is_causal
from farspan.kernels.problem import Problem


class FlashAttention4:
    """In one of its two modes: its backward pass adds to dq in any order, or more slowly in a fixed one."""

    any_mask = False
    plans_shapes = False

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic
        self.name = "flash_attn_4_deterministic" if deterministic else "flash_attn_4"

    def refusal(self, problem: Problem) -> str | None:
        if problem.capability is None or problem.capability < (9, 0):
            return f"{self.name} needs a GPU of compute capability 9.0 or newer"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"{self.name} takes bf16 and fp16, got {problem.dtype}"
        dim, value_dim = problem.head_dim, problem.value_dim
        if dim != value_dim or dim % 8 or dim > 128:
            return f"{self.name} takes one head dim, a multiple of 8 up to 128, got {dim} and {value_dim}"
        if problem.sparse:
            return f"{self.name} computes all that a mask shows, and a sparse index selects a part of it"
        if not problem.out_given:
            return f"{self.name} computes delta itself and needs the global out, which rows that travel leave behind"
        missing = _missing()
        return f"{self.name} {missing}" if missing else None

    def attend(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        given = {"softmax_scale": call.scale, "causal": is_causal(call)}
        out, lse, *_ = _flash_attn_fwd(call.q, call.k, call.v, **given, return_lse=True)
        return call.deliver(out, lse)

    def attend_backward(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd

        assert call.out is not None, "see refusal"
        given = {"softmax_scale": call.scale, "causal": is_causal(call), "deterministic": self.deterministic}
        dout, lse = call.dout.contiguous(), call.lse.contiguous()
        return call.deliver(_flash_attn_bwd(call.q, call.k, call.v, call.out, dout, lse, **given)[:3])


@cache
def _missing() -> str | None:
    """Why its functions cannot be called; None if they can."""
    try:
        import_module("flash_attn.cute.interface")
    except ModuleNotFoundError as error:
        if error.name in ("flash_attn", "flash_attn.cute"):
            return "is not installed (pip install 'farspan[fa4]')"
        return f"cannot be imported: {error}"
    except Exception as error:  # its libraries say in many ways that a part of them is missing
        return f"cannot be imported: {str(error).splitlines()[0]}"
    return None
