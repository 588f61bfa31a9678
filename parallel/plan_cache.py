"""Plans for models that are not ours: found by what a batch looks like, prepared once, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.parallel import orders, plans
from farspan.parallel.execute import attention
from farspan.parallel.orders import Order
from farspan.parallel.prepare import PreparedPlan, prepare


@dataclass(frozen=True)
class Layout:
    """A packed row, and which of the `world` ranks holds which of its tokens. Equal layouts share their plans.

    `cu_seqlens` are the cumulative lengths of its documents, which do not see each other, from 0 to `length`; None
    where the row is one document. With `by_document` each document is cut by itself, not the row as a whole.
    """

    order: str
    length: int
    world: int
    stripe: int = 128
    cu_seqlens: tuple[int, ...] | None = None
    by_document: bool = False

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None and (self.cu_seqlens[0], self.cu_seqlens[-1]) != (0, self.length):
            raise ValueError(
                f"cu_seqlens must ascend from 0 to {self.length}, the tokens of the whole row, but goes from "
                f"{self.cu_seqlens[0]} to {self.cu_seqlens[-1]}"
            )

    def cut(self) -> Order:
        if self.by_document and self.order == "zigzag" and self.cu_seqlens is not None:
            return orders.zigzag_documents(self.cu_seqlens, self.world)
        return orders.build(self.order, self.length, self.world, self.stripe)

    def mask(self, window: int | None) -> IntervalMask:
        """Causal within each document; with `window`, the last so many tokens alone, the row itself included."""
        if window is None:
            return masks.causal(self.length, self.cu_seqlens)
        return masks.sliding_window(self.length, window, cu_seqlens=self.cu_seqlens)


class PlanCache:
    """Prepares a plan when the first layer of a new kind of batch asks for it, and remembers the last `size` of them.

    `plan` and `backend` are what `parallel.plan` and `attention.backend` are in Farspan's own configuration.
    """

    def __init__(self, plan: str, backend: str = "deterministic", size: int = 16) -> None:
        if plan not in plans.PLANS:
            raise ValueError(f"plan is {plan!r}; possible are {', '.join(plans.PLANS)}")
        self.plan, self.backend = plan, backend
        self.order = lru_cache(size)(Layout.cut)
        self._prepared = lru_cache(size)(self._prepare)
        self._read: list[tuple[Tensor, int, tuple[int, ...]]] = []

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        group: dist.ProcessGroup | None,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """This rank's slots of the row, q `[B, slots, H, D]`, k and v `[B, slots, Hkv, D]`; returns `[B, slots, H, D]`.

        ValueError if q does not have the number of slots that the layout gives to each rank.
        """
        slots = self.order(layout).slots
        if q.shape[1] != slots:
            raise ValueError(
                f"{layout.order} order over {layout.world} ranks gives each rank {slots} of {layout.length} tokens, "
                f"but attention got {q.shape[1]}: pad the rows, or take another order"
            )
        rank = 0 if group is None else group.rank()
        prepared = self._prepared(layout, (q.shape[2], k.shape[2]), window, rank, q.device)
        return attention(q, k, v, prepared, group, scale=scale, backend=self.backend)[0]

    def documents(self, cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
        """Cumulative lengths as numbers. A tensor is read once, not once a layer: reading makes the host wait."""
        if not isinstance(cu_seqlens, Tensor):
            return tuple(map(int, cu_seqlens))
        for tensor, version, numbers in self._read:
            if tensor is cu_seqlens and version == cu_seqlens._version:
                return numbers
        numbers = tuple(cu_seqlens.tolist())
        self._read = [*self._read[-7:], (cu_seqlens, cu_seqlens._version, numbers)]
        return numbers

    def _prepare(
        self, layout: Layout, heads: tuple[int, int], window: int | None, rank: int, device: torch.device
    ) -> PreparedPlan:
        order, mask = self.order(layout), layout.mask(window)
        plan = plans.build(self.plan if layout.world > 1 else "single", order, mask, heads)
        return prepare(plan, order, mask, rank, device)
