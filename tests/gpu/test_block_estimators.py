"""XAttention and MoBA on a GPU, in bf16: nothing waited for, and a block's choice the same beside any others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.kernels.block_index import BlockIndex
from farspan.kernels.chunk_index import ChunkIndex
from farspan.kernels.estimate import MoBA, Settings, XAttention
from farspan.kernels.estimate.moba import ChunkSight, block_sums, moba
from farspan.kernels.estimate.xattention import CellSight, xattention
from farspan.kernels.tiles import TILE
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

pytestmark = pytest.mark.gpu

METHODS = [XAttention(threshold=0.7), MoBA(512, 4)]


def inputs(length: int, heads: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    """Queries of a block are alike, so that not everything is chosen."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, -(-length // TILE), heads[0], dim, generator=generator).repeat_interleave(TILE, 1)
    q = 3 * shared[:, :length] + torch.randn(1, length, heads[0], dim, generator=generator)
    k = torch.randn(1, -(-length // 16), heads[1], dim, generator=generator).repeat_interleave(16, 1)[:, :length]
    return q.bfloat16().cuda(), k.bfloat16().cuda()


def estimator(length: int, mask: IntervalMask, settings: Settings, device: str) -> Estimator:
    return Estimator(orders.contiguous(length, 1), mask, settings, 0, None, device)


@pytest.mark.parametrize("settings", METHODS, ids=["xattention", "moba"])
def test_a_choice_is_found_without_waiting_and_twice_the_same(settings: Settings) -> None:
    length = 8000
    mask = masks.causal(length, [0, 3000, 3033, length])
    q, k = inputs(length, (8, 2), 128)
    choose = estimator(length, mask, settings, "cuda")
    first, _ = choose(q, k)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second, _ = choose(q, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu, _ = estimator(length, mask, settings, "cpu")(q.cpu(), k.cpu())
    for x in (first, second, on_cpu):
        assert isinstance(x, BlockIndex | ChunkIndex)
    assert torch.equal(first.words, second.words)
    rows, keys = torch.arange(5, length, 61), torch.arange(0, length, 64)
    alike = first.selects(rows.cuda(), keys.cuda()).cpu() == on_cpu.selects(rows, keys)
    assert float(alike.double().mean()) > 0.999
    assert float(first.density().max()) < 0.9


@pytest.mark.parametrize("length", [16384, 131072])
@pytest.mark.parametrize("heads", [(16, 2), (4, 4)])
@pytest.mark.parametrize("settings", METHODS, ids=["xattention", "moba"])
def test_a_block_is_chosen_for_alike_beside_any_others(settings: Settings, heads: tuple[int, int], length: int) -> None:
    """By 2, 3 and 8 holders of striped blocks, and by those of the last quarter."""
    mask, blocks = masks.causal(length), length // TILE
    q, k = inputs(length, heads, 128)
    rows, keys = (x.unflatten(1, (-1, TILE)).movedim(1, 0) for x in (q, k))

    def choose(numbers: np.ndarray) -> Tensor:
        at = torch.from_numpy(numbers).cuda()
        if isinstance(settings, MoBA):
            return moba(rows[at], block_sums(keys), ChunkSight.of(mask, numbers, settings.chunk, "cuda"), settings)
        assert isinstance(settings, XAttention)
        return xattention(rows[at], keys, CellSight.of(mask, numbers, settings.stride, "cuda"), settings, 128**-0.5)

    every = np.arange(blocks)
    whole = choose(every)
    for numbers in (every[1::2], every[2::3], every[5::8], every[-(blocks // 4) :]):
        assert torch.equal(choose(numbers), whole[torch.from_numpy(numbers).cuda()])
