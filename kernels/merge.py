"""Merging partial attention results over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.triton import merge as merge_kernel


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16, fp16 and fp32; fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over keys a and b together, from attention over each.

    out `[B, S, H, D]`, lse `[B, H, S]` (natural log, -inf where a row sees no key). The weights are sigmoids of the
    difference of the two lse, so gaps of any size are safe, and a side of -inf leaves the other unchanged bit for bit.
    Results have the dtypes of `out_a` and `lse_a`.
    """
    # Where both are -inf the difference is NaN; 0 leaves weights of 1/2 on two outputs that are 0.
    gap = torch.where(lse_a == lse_b, torch.zeros_like(lse_a), lse_b - lse_a)
    weight = torch.sigmoid(gap).transpose(1, 2).unsqueeze(-1)
    out = torch.where(weight == 1, out_b, out_a + weight * (out_b - out_a))
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b).to(lse_a.dtype)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`merge` in place: out and lse take in a part computed over other keys."""
    tensors = (out, lse, part, part_lse)
    if out.is_cuda and out.dtype == torch.float32 and all(x.stride(-1) == 1 for x in tensors):
        merge_kernel.merge_into(*tensors)
        return
    merged, merged_lse = merge(*tensors)
    out.copy_(merged)
    lse.copy_(merged_lse)
