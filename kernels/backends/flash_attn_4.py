"""FlashAttention-4 (PyPI `flash-attn-4`, the extra `farspan[fa4]`): CuTe kernels for Hopper and Blackwell."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from farspan.kernels.backends.base import Accumulated, deliver, deliver_gradients
from farspan.kernels.masks import IntervalMask
from farspan.kernels.tiles import TileMap

any_mask = False


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not _installed():
        return "flash_attn_4 is not installed (pip install 'farspan[fa4]')"
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] < 9:
        return "flash_attn_4 needs a GPU of compute capability 9.0 or newer"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash_attn_4 takes bf16 and fp16, got {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 128:
        return f"flash_attn_4 takes one head dim, a multiple of 8 up to 128, got {q.shape[3]} and {v.shape[3]}"
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

    if out is None:
        raise ValueError("flash_attn_4 computes delta itself and needs the global out, which is None")
    causal = TileMap.of(mask, k.shape[1]).offset != k.shape[1]
    gradients = _flash_attn_bwd(
        q, k, v, out, dout.contiguous(), lse.contiguous(), softmax_scale=scale, causal=causal, deterministic=True
    )
    return deliver_gradients(gradients[:3], out_dtype, accumulate)


@cache
def _installed() -> bool:
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
