"""Sparse indexes, and what they select by definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.index import VerticalSlashIndex


class IndexCase(NamedTuple):
    name: str
    index: VerticalSlashIndex
    selected: Tensor
    """Bool `[B, H, length, length]`, causal or not."""


def index_cases(length: int, heads: int, block: int, batch: int = 1) -> list[IndexCase]:
    """Few and many diagonals; columns none, few, alone, in selected tiles, all; every head another draw."""
    blocks = -(-length // block)
    generator = torch.Generator().manual_seed(length + heads)

    def draw(count: int, share: float) -> Tensor:
        return torch.rand(batch, heads, count, generator=generator) < share

    nothing = torch.zeros(batch, heads, length, dtype=torch.bool)
    diagonals = {
        "some": (draw(blocks, 0.3), draw(length, 0.05)),
        "no columns": (draw(blocks, 0.3), nothing),
        "columns alone": (draw(blocks, 0.0), draw(length, 0.1)),
        "columns in tiles": (draw(blocks, 0.7), draw(length, 0.5)),
        "one head has all": (draw(blocks, 0.2), nothing),
        "everything": (draw(blocks, 1.1), draw(length, 1.1)),
    }
    diagonals["one head has all"][0][:, 0] = True
    return [IndexCase(name, *_case(length, block, *chosen)) for name, chosen in diagonals.items()]


def _case(length: int, block: int, diagonals: Tensor, columns: Tensor) -> tuple[VerticalSlashIndex, Tensor]:
    diagonals[..., 0] = True
    listed = torch.where(columns, torch.arange(length), length).sort(-1).values
    most = max(1, int(columns.sum(-1).max()))
    index = VerticalSlashIndex(diagonals, listed[..., :most].int().contiguous(), length, block)
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    distance = q // block - k // block
    selected = torch.stack(
        [
            torch.stack(
                [(diagonals[b, h][distance.clamp(min=0)] & (distance >= 0)) | columns[b, h] for h in range(heads)]
            )
            for b, heads in enumerate([diagonals.shape[1]] * len(diagonals))
        ]
    )
    return index, selected
