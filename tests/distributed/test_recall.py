"""What an index covers of exact attention, measured by the ranks that share a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.index_cases import index_cases
from support.oracle import mask_cases, random_qkv
from support.pool import Pool
from torch import Tensor

from farspan.parallel import orders
from farspan.parallel.recall import Recall

pytestmark = pytest.mark.distributed

BLOCK, HEADS, ROWS = 4, (4, 2), np.array([0, 5, 6, 17, 30, 31, 47])


def measure(rank: int, world: int, order_name: str, mask_name: str, case_number: int) -> tuple[Tensor, Tensor]:
    """The measured shares, and those of dense softmax."""
    length = 48
    order = orders.build(order_name, length, world, BLOCK)
    mask = next(case for case in mask_cases(length) if case.name == mask_name)
    case = index_cases(length, HEADS[0], BLOCK, batch=2)[case_number]
    q, k, _, _ = random_qkv(length, HEADS, 8, batch=2)
    recall = Recall(ROWS, order, mask.mask, rank, dist.group.WORLD)
    found = recall(order.shard(q, rank, padding=7.0), order.shard(k, rank, padding=7.0), case.index)
    scores = torch.einsum("bihd,bjhd->bhij", q[:, ROWS], k.repeat_interleave(2, 2)) * 8**-0.5
    seen = mask.allowed[:, None, ROWS]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    selected = case.selected[:, :, ROWS] & seen
    share = torch.where(seen.any(-1), (weights * selected).sum(-1), 1.0)
    return found, share


@pytest.mark.parametrize(
    ("world", "order", "mask", "case"),
    [
        (1, "contiguous", "causal", 0),
        (2, "striped", "documents", 0),
        (3, "zigzag", "causal", 1),
        (3, "striped", "blind", 2),
    ],
)
def test_equals_dense_softmax(pool: Pool, world: int, order: str, mask: str, case: int) -> None:
    for found, share in pool.run(world, measure, order, mask, case):
        assert torch.allclose(found.double(), share, atol=1e-5)
        assert float(share.min()) < 0.999
