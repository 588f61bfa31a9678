"""Attention of rows that all ranks have over keys that they share, without gradients: for reading and decoding."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import IntervalMask, accumulation_dtype, attend


def attend_shared_keys(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, group: dist.ProcessGroup, backend: str = "auto"
) -> Tensor:
    """out `[B, S, H, D]` in q's dtype over the keys of all ranks of `group`; collective, the same on each of them.

    Args:
        q: `[B, S, H, D]`, the same on all ranks.
        k, v: `[B, N, Hkv, D]`, this rank's own keys; N differs between ranks, and may be 0.
        mask: which of its own keys this rank's rows see.

    What travels is S x H x (D + 2) numbers in the accumulation dtype, whatever N is.
    """
    work = accumulation_dtype(q.dtype)
    if k.shape[1]:
        out, lse = attend(q, k, v, mask, backend=backend, out_dtype=work)
    else:
        out = torch.zeros_like(q, dtype=work)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=work)
    return merge_over(out, lse, group).to(q.dtype)


def merge_over(out: Tensor, lse: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`kernels.merge` of all ranks' partial results, out `[B, S, H, D]` and lse `[B, H, S]`, by two all-reduces.

    Safe for gaps of any size between lse, and for ranks that see nothing; where none sees anything the result is 0.
    """
    if group.size() == 1:
        return out
    highest = lse.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    weight = torch.where(lse == float("-inf"), 0.0, (lse - highest).exp()).transpose(1, 2).unsqueeze(-1)
    sums = torch.cat([weight * out, weight], -1)
    dist.all_reduce(sums, group=group)
    total = sums[..., -1:]
    return sums[..., :-1] / torch.where(total == 0, 1.0, total)
