"""Rotary position embeddings (RoPE, arXiv:2104.09864), in the half-split layout of Llama and Qwen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels import accumulation_dtype
from farspan.models.compiled import compiled


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosine and sine of every token's angles, fp32 `[B, S, 1, D / 2]`; made once a batch, shared by all layers."""

    cosine: Tensor
    sine: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates `[B, S, H, D]`."""
        return rotate(x.flatten(0, 1), self.cosine.flatten(0, 1), self.sine.flatten(0, 1)).view_as(x)


@compiled
def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates `[tokens, H, D]` in fp32 or fp64 by `[tokens, 1, D / 2]`; returns x's dtype."""
    first, second = x.to(accumulation_dtype(x.dtype)).chunk(2, -1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(rotated, -1).to(x.dtype)


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """fp64 `[D / 2]`: radians per position of each pair. Methods that scale the context change only these."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rotation(rotary_positions: Tensor, frequencies: Tensor) -> Rotation:
    """For positions `[B, S]`. Angles are fp64: in fp32, position 1M would be off by up to 0.06 radians."""
    angles = rotary_positions.double()[..., None, None] * frequencies.to(rotary_positions.device)
    return Rotation(angles.cos().float(), angles.sin().float())
