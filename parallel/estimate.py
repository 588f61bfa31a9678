"""Choosing a sparse index where several ranks share a row: the same index, bit for bit, as one device would choose."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import IntervalMask
from farspan.kernels.estimate import Budgets, MoBA, Settings, VerticalSlash, XAttention
from farspan.kernels.index import Index
from farspan.parallel.estimate_blocks import MoBAEstimator, XAttentionEstimator
from farspan.parallel.estimate_probes import ProbeEstimator
from farspan.parallel.orders import Order

_METHODS: dict[type, Any] = {VerticalSlash: ProbeEstimator, XAttention: XAttentionEstimator, MoBA: MoBAEstimator}


class Estimator:
    """Chooses for all layers of one batch that have this mask; every rank of the group makes one and calls it.

    The class of `settings` says by which method.
    """

    def __init__(
        self,
        order: Order,
        mask: IntervalMask,
        settings: Settings,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device | str,
    ) -> None:
        """`mask` in positions, on the host; `group` of the ranks of `order`, None where it is one.

        ValueError where the order does not keep blocks of 128 positions together.
        """
        if order.world > 1 and (group is None or group.size() != order.world):
            raise ValueError(f"an order of {order.world} ranks needs the process group of these ranks")
        self.method = _METHODS[type(settings)](order, mask, settings, rank, group if order.world > 1 else None, device)

    def __call__(
        self, q: Tensor, k: Tensor, scale: float | None = None, budgets: Budgets | None = None
    ) -> tuple[Index, Tensor | None]:
        """Of q `[B, slots, H, D]` and k `[B, slots, Hkv, D]` of this rank, rotated; collective.

        Returns the index of all query heads, and where it is known what share of the probes' attention it computes,
        fp64 `[B, H]`. `scale` is that of the scores, `D ** -0.5` when None. `budgets` are for a vertical-slash index
        alone. The index is a choice: nothing is differentiated through it.
        """
        found: tuple[Index, Tensor | None] = self.method(
            q.detach(), k.detach(), q.shape[-1] ** -0.5 if scale is None else scale, budgets
        )
        return found
