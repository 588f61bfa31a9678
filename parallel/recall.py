"""How much of exact attention a sparse index computes, measured on some rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import IntervalMask, to_device
from farspan.kernels.index import Index
from farspan.parallel.orders import Order

_KEYS = 4096  # scored at once


class Recall:
    """For rows at `positions` of the packed row; made once a batch, called with any layer's queries, keys and index."""

    def __init__(
        self,
        positions: np.ndarray,
        order: Order,
        mask: IntervalMask,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`group` is of the ranks that share the row; None for one."""
        held = order.positions[rank]
        self.group = group
        self.slots = to_device(torch.from_numpy(np.searchsorted(held, positions).clip(max=len(held) - 1)), device)
        self.here = to_device(torch.from_numpy(np.isin(positions, held)), device)
        self.rows = to_device(torch.from_numpy(positions.astype(np.int64)), device)
        self.columns = to_device(torch.from_numpy(held.astype(np.int64)), device)
        self.mask = mask.at(positions, held).to(device)

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, index: Index, scale: float | None = None) -> Tensor:
        """fp32 `[B, H, rows]`: the share of each row's attention that the index computes; 1 where a row sees nothing.

        q `[B, slots, H, D]` and k `[B, slots, Hkv, D]` are this rank's slots. Collective.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # Each row is on one rank, so that the sum is that rank's.
        rows = torch.where(self.here[:, None, None], q[:, self.slots].float(), 0.0) * scale
        self._all(rows, dist.ReduceOp.SUM)
        batch, count, heads, dim = rows.shape
        rows = rows.view(batch, count, k.shape[2], -1, dim)
        highest = q.new_full((batch, heads, count), float("-inf"), dtype=torch.float32)
        for _, scores in self._scores(rows, k):
            highest = torch.maximum(highest, scores.amax(-1))
        self._all(highest, dist.ReduceOp.MAX)
        highest = torch.where(highest == float("-inf"), 0.0, highest)
        sums = q.new_zeros(2, batch, heads, count, dtype=torch.float32)
        for keys, scores in self._scores(rows, k):
            weights = (scores - highest[..., None]).exp()
            sums[0] += weights.sum(-1)
            sums[1] += torch.where(index.selects(self.rows, self.columns[keys]), weights, 0.0).sum(-1)
        self._all(sums, dist.ReduceOp.SUM)
        return torch.where(sums[0] > 0, sums[1] / sums[0], 1.0)

    def _scores(self, rows: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Keys, and the rows' scores of them, `[B, H, rows, keys]`, -inf where the mask hides."""
        for first in range(0, k.shape[1], _KEYS):
            keys = slice(first, min(first + _KEYS, k.shape[1]))
            scores = torch.einsum("bpkgd,bnkd->bkgpn", rows, k[:, keys].float()).flatten(1, 2)
            seen = self.mask.visible(slice(0, len(self.rows)), keys)[:, None]
            yield keys, scores.masked_fill_(~seen, float("-inf"))

    def _all(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.group is not None:
            dist.all_reduce(x, operation, group=self.group)
