"""cuDNN and FlashAttention-2 as torch ships them, through the operators that return lse and take the merged one back.

They compute rectangles: full ones, and causal ones with as many rows as keys. Partial outputs come back in the dtype of
q, so a merged result carries their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farspan.kernels.backends import reference
from farspan.kernels.backends.base import BackwardCall, ForwardCall, is_causal
from farspan.kernels.problem import Problem


class TorchLibrary:
    """One of torch's attention libraries."""

    any_mask = False
    deterministic = False

    def __init__(self, name: str, capability: tuple[int, int], max_dim: int) -> None:
        self.name, self.capability, self.max_dim = name, capability, max_dim
        self.plans_shapes = name == "cudnn"

    def refusal(self, problem: Problem) -> str | None:
        if problem.capability is None:
            return f"{self.name} needs a GPU"
        if problem.capability < self.capability:
            return f"{self.name} needs a GPU of compute capability {'.'.join(map(str, self.capability))} or newer"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"{self.name} takes bf16 and fp16, got {problem.dtype}"
        dim, value_dim = problem.head_dim, problem.value_dim
        if dim != value_dim or dim % 8 or dim > self.max_dim:
            return (
                f"{self.name} takes one head dim for keys and values, a multiple of 8 up to {self.max_dim}, "
                f"got {dim} and {value_dim}"
            )
        if problem.sparse:
            return f"{self.name} computes all that a mask shows, and a sparse index selects a part of it"
        if not problem.out_given:
            return f"{self.name} computes delta itself and needs the global out, which rows that travel leave behind"
        return None

    def attend(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        if call.q.shape[1] == call.k.shape[1] == 1:  # which cuDNN refuses
            return reference.attend(call)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        causal, scale = is_causal(call), call.scale
        if self.name == "cudnn":
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, False, scale=scale
            )
        else:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return call.deliver(out.transpose(1, 2), lse.view(q.shape[:3]))

    def attend_backward(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        if call.q.shape[1] == call.k.shape[1] == 1:
            return reference.attend_backward(call)
        assert call.out is not None, "see refusal"
        dout, q, k, v, out = (x.transpose(1, 2) for x in (call.dout, call.q, call.k, call.v, call.out))
        causal, scale = is_causal(call), call.scale
        # Neither dropout nor packed sequences: no seeds, no cumulative lengths.
        unused: Any = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = (None, None, q.shape[2], k.shape[2])
        lse = call.lse.contiguous()  # flash does not look at its strides
        if self.name == "cudnn":
            gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, *lengths, 0.0, causal, scale=scale
            )
        else:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                dout, q, k, v, out, lse, *lengths, 0.0, causal, unused, unused, scale=scale
            )
        return call.deliver(tuple(x.transpose(1, 2) for x in gradients))
