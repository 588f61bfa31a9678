"""Vertical-slash indexes where several ranks share a row: the same, bit for bit, as one device would choose.

What travels is small whatever the row's length: the probes' queries, integers by probe and by distance, and of each
rank the columns that may be chosen, which ranks judge in shares of the heads.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import IntervalMask, to_device
from farspan.kernels.estimate import Alone, Budgets, Holders, Probes, VerticalSlash, probe_positions, vertical_slash
from farspan.kernels.estimate.select import shortest, strongest
from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel.orders import Order


class ProbeEstimator:
    """`Estimator` by the attention of some rows, the probes."""

    def __init__(
        self,
        order: Order,
        mask: IntervalMask,
        settings: VerticalSlash,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device | str,
    ) -> None:
        self.settings = settings
        self._group = group
        self._holders: Holders = Alone() if group is None else _Group(group)
        held = order.positions[rank]
        positions = probe_positions(mask, settings)
        self.probes = Probes.of(positions, mask, held, device)
        self.k_positions = to_device(torch.from_numpy(held), device)
        wanted = positions.reshape(len(positions), -1)
        slots = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
        here = (held[slots] == wanted) & (wanted < order.length)
        self._slots, self._here = (to_device(torch.from_numpy(x), device) for x in (slots, here))

    def __call__(
        self, q: Tensor, k: Tensor, scale: float, budgets: Budgets | None
    ) -> tuple[VerticalSlashIndex, Tensor]:
        queries = self._probe_queries(q)
        given = (queries, k, self.k_positions, self.probes, self.settings, self._holders, scale, budgets)
        return vertical_slash(*given)

    def _probe_queries(self, q: Tensor) -> Tensor:
        """`[B, H, probes, D]` on all ranks: a sum, as integers, of one rank's bits and of zeros."""
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        taken = torch.where(self._here[..., None, None], q[row, self._slots], 0).transpose(1, 2).contiguous()
        if self._group is not None:
            dist.all_reduce(taken.flatten().view(torch.int32), group=self._group)
        return taken


class _Group:
    """The ranks that hold a row's keys together, by collectives whose results don't depend on an order of terms."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def highest(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def choose(self, candidates: Tensor, target: Tensor, most: int, nowhere: int) -> Tensor:
        """Every rank chooses for its share of the lines, from the candidates of all, and all learn the result."""
        world, lines = self.group.size(), len(candidates)
        of_each = -(-lines // world)
        sent = candidates.new_zeros(world * of_each, candidates.shape[1])
        sent[:lines] = candidates
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        mine = received.view(world, of_each, -1).transpose(0, 1).flatten(1)
        targets = target.new_zeros(world * of_each)
        targets[:lines] = target
        first = self.group.rank() * of_each
        chosen = shortest(strongest(mine, most), targets[first : first + of_each], nowhere)
        whole = chosen.new_empty(world * of_each, most)
        dist.all_gather_into_tensor(whole, chosen.contiguous(), group=self.group)
        return whole[:lines]
