"""Micro-batches: rows of text, put into the order of the plan once and for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farspan.data.rows import IGNORED, Row
from farspan.data.visibility import BY_DOCUMENT, Visibility
from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order


@dataclass(frozen=True, eq=False)
class Batch:
    """What one context rank holds of a micro-batch.

    tokens, labels and rotary_positions are int64 `[rows, slots]`, in the slots of `order`; padding slots have no label.
    `masks` are those of the whole rows, `[1 or rows, length]`, in positions: one for each way in which some layers see
    them. `rank` is the context rank, `valid` counts its labels. `bounds` are the `cu_seqlens` of the rows, `samples`
    their sample numbers.
    """

    tokens: Tensor
    labels: Tensor
    rotary_positions: Tensor
    masks: dict[Visibility, IntervalMask]
    order: Order
    rank: int
    valid: int
    bounds: tuple[NDArray[np.int64], ...]
    samples: tuple[int, ...]


def make_batch(
    rows: Sequence[Row],
    order: Order,
    rank: int,
    samples: Sequence[int] = (),
    visibilities: Sequence[Visibility] = (BY_DOCUMENT,),
) -> Batch:
    """The share of context rank `rank`: labels are shifted already, and nothing is permuted again after this.

    `visibilities` are those of the layers, alike in `across_documents`: rotary positions restart at each document,
    unless tokens see across documents.
    """
    whole = np.arange(order.length)
    positions = [whole if visibilities[0].across_documents else row.positions for row in rows]

    def shard(values: Sequence[np.ndarray], padding: int) -> Tensor:
        return order.shard(torch.from_numpy(np.stack(values)), rank, padding=padding)

    labels = shard([row.labels for row in rows], IGNORED)
    return Batch(
        tokens=shard([row.tokens for row in rows], 0),
        labels=labels,
        rotary_positions=shard(positions, 0),
        masks={visibility: visibility.mask(rows) for visibility in dict.fromkeys(visibilities)},
        order=order,
        rank=rank,
        valid=int((labels != IGNORED).sum()),
        bounds=tuple(row.cu_seqlens for row in rows),
        samples=tuple(samples),
    )
