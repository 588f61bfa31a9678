"""Queries and keys whose attention has planted columns and diagonals, and what an index covers by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels import IntervalMask
from farspan.kernels.estimate import VerticalSlash, probe_positions
from farspan.kernels.index import VerticalSlashIndex

DIM = 32


def planted(
    length: int,
    heads: tuple[int, int],
    columns: tuple[int, ...] = (),
    offsets: tuple[int, ...] = (),
    strength: float = 14.0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """q `[B, length, H, 32]` and k: every row attends to the `columns` and to what is `offsets` before it.

    A key has a code of its own, and the keys of columns a common one, each more of it than the one before; a query is
    the sum of the codes that it wants. Heads attend less and less sharply.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    code = torch.nn.functional.normalize(draw(batch, length, heads[1], DIM), dim=-1)
    common = torch.nn.functional.normalize(draw(DIM), dim=0)
    code[:, list(columns)] = common * torch.linspace(0.95, 1, len(columns))[:, None, None]
    group = heads[0] // heads[1]
    wanted = torch.zeros_like(code) + (common if columns else 0)
    for offset in offsets:
        wanted[:, offset:] += code[:, : length - offset]
    q = wanted.repeat_interleave(group, 2) + 0.01 * draw(batch, length, heads[0], DIM)
    q *= strength * torch.linspace(1, 0.6, heads[0])[:, None]
    return q.to(dtype), (code * DIM**0.5).to(dtype)


def masses(q: Tensor, k: Tensor, allowed: Tensor, settings: VerticalSlash, mask: IntervalMask) -> tuple[Tensor, Tensor]:
    """fp64 softmax `[B, H, probes, length]` of the probes, and their positions int64 `[B or 1, probes]`."""
    positions = torch.from_numpy(probe_positions(mask, settings)).flatten(1)
    batch, length = q.shape[:2]
    absent = positions >= length
    rows = positions.clamp(max=length - 1).expand(batch, -1)
    queries = q.double()[torch.arange(batch)[:, None], rows]
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bphd,bnhd->bhpn", queries, keys) / q.shape[3] ** 0.5
    seen = allowed.expand(batch, -1, -1)[torch.arange(batch)[:, None], rows] & ~absent[..., None]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0)
    return weights, torch.where(absent, 0, positions)


def covered(weights: Tensor, positions: Tensor, index: VerticalSlashIndex) -> Tensor:
    """fp64 `[B, H]`: the share of the probes' attention that the index computes."""
    batch = weights.shape[0]
    dense = index.to_dense()
    rows = positions.expand(batch, -1)
    selected = dense.transpose(1, 2)[torch.arange(batch)[:, None], rows].transpose(1, 2)
    total = weights.sum((2, 3))
    return torch.where(total > 0, (weights * selected).sum((2, 3)) / total.clamp(min=1e-300), 1.0)
