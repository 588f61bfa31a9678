"""XAttention's choice against its definition in dense fp64 matrices."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.block_choices import xattention_masses, xattention_tiles
from support.planted import planted
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.kernels.bits import members, packed
from farspan.kernels.estimate import XAttention
from farspan.kernels.estimate.xattention import CellSight, cells_count, xattention
from farspan.kernels.tiles import TILE

LENGTH = 1019
BLOCKS = -(-LENGTH // TILE)


def choose(q: Tensor, k: Tensor, mask: IntervalMask, settings: XAttention, numbers: np.ndarray | None = None) -> Tensor:
    """Bool `[B, H, row blocks, blocks]` for some blocks of rows, or all."""
    counts = torch.from_numpy(cells_count(mask, settings.stride))[..., None, None]
    numbers = np.arange(-(-mask.rows // TILE)) if numbers is None else numbers

    def blocks(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -mask.rows % TILE))
        return x.unflatten(1, (-1, TILE)).movedim(1, 0)

    sight = CellSight.of(mask, numbers, settings.stride)
    words = xattention(
        blocks(q)[numbers], blocks(torch.where(counts, k, 0)), sight, settings, q.shape[3] ** -0.5
    ).permute(1, 2, 0, 3)
    return members(words, torch.arange(-(-mask.rows // TILE)))


def inputs(kind: str, heads: tuple[int, int] = (4, 2), batch: int = 1) -> tuple[Tensor, Tensor]:
    if kind == "planted":
        return planted(LENGTH, heads, (40, 200, 411), (300, 641), 30.0, batch)
    generator = torch.Generator().manual_seed(5)
    strength = 4.0 if kind == "sharp" else 1.0
    return tuple(torch.randn(batch, LENGTH, h, 32, generator=generator) * strength for h in heads)  # type: ignore[return-value]


@pytest.mark.parametrize("stride", [8, 16, 64])
@pytest.mark.parametrize("kind", ["planted", "sharp", "noise"])
def test_equals_the_definition(kind: str, stride: int) -> None:
    q, k = inputs(kind)
    masses = [xattention_masses(q[0, :, h], k[0, :, h // 2], stride) for h in range(4)]
    for threshold in (0.5, 0.9, 1.0):
        found = choose(q, k, masks.causal(LENGTH), XAttention(stride, threshold))
        for h in range(4):
            if threshold < 1:
                assert torch.equal(found[0, h], xattention_tiles(masses[h], threshold))
            else:  # all that has any mass
                assert bool((found[0, h] >= (masses[h] > 1e-6)).all())
    assert not found.triu(1).any()


def test_less_than_all_is_chosen() -> None:
    q, k = inputs("sharp")
    chosen = choose(q, k, masks.causal(LENGTH), XAttention(threshold=0.5))
    assert float(chosen.float().mean()) < 0.45


def test_the_own_and_the_first_block_are_always_computed() -> None:
    q, k = inputs("noise")
    chosen = choose(q, k, masks.causal(LENGTH), XAttention(threshold=1e-6))
    wanted = torch.eye(BLOCKS, dtype=torch.bool)
    wanted[:, 0] = True
    assert torch.equal(chosen, wanted.expand(1, 4, -1, -1))


def test_equal_masses_are_chosen_by_position() -> None:
    """Keys and queries alike: of blocks with the same mass the first ones."""
    q, k = torch.ones(1, 1024, 2, 16), torch.ones(1, 1024, 1, 16)
    chosen = choose(q, k, masks.causal(1024), XAttention(threshold=0.6))
    last = chosen[0, 0, 7].tolist()
    assert last == [True] * 4 + [False] * 3 + [True]


def test_documents_that_begin_with_blocks_are_chosen_for_by_themselves() -> None:
    bounds = [0, 384, 512, LENGTH]
    q, k = inputs("sharp")
    settings = XAttention(threshold=0.6)
    chosen = choose(q, k, masks.causal(LENGTH, bounds), settings)
    wanted = torch.zeros_like(chosen)
    for first, last in pairwise(bounds):
        blocks = slice(first // TILE, -(-last // TILE))
        for h in range(4):
            masses = xattention_masses(q[0, first:last, h], k[0, first:last, h // 2], settings.stride)
            wanted[0, h, blocks, blocks] = xattention_tiles(masses, settings.threshold)
    assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("bound", [397, 400, 511, 513])
def test_nothing_is_seen_of_another_document(bound: int) -> None:
    """Blocks of rows of the second document alone choose as if the first were another one, and none of its tiles."""
    q, k = inputs("sharp")
    other_q, other_k = q.clone(), k.clone()
    other_q[:, :bound], other_k[:, :bound] = 7.0, -7.0
    mask, settings = masks.causal(LENGTH, [0, bound, LENGTH]), XAttention(threshold=0.8)
    found, again = choose(q, k, mask, settings), choose(other_q, other_k, mask, settings)
    behind = -(-bound // TILE)
    assert torch.equal(found[:, :, behind:], again[:, :, behind:])
    assert not found[:, :, behind:, : bound // TILE].any()
    assert found[:, :, behind:, bound // TILE].all()  # where the document begins


def test_rows_of_a_batch_are_chosen_for_by_themselves() -> None:
    q, k = inputs("sharp", batch=2)
    both = masks.stack([masks.causal(LENGTH, [0, 450, LENGTH]), masks.causal(LENGTH)])
    found = choose(q, k, both, XAttention(threshold=0.7))
    for b, mask in enumerate((masks.causal(LENGTH, [0, 450, LENGTH]), masks.causal(LENGTH))):
        assert torch.equal(found[b : b + 1], choose(q[b : b + 1], k[b : b + 1], mask, XAttention(threshold=0.7)))
    shared = choose(q, k, masks.causal(LENGTH), XAttention(threshold=0.7))
    assert torch.equal(shared[1], found[1])


def test_a_block_is_chosen_for_alike_beside_any_others() -> None:
    q, k = inputs("sharp", (6, 2))
    mask, settings = masks.causal(LENGTH), XAttention(threshold=0.8)
    whole = choose(q, k, mask, settings)
    for numbers in ([0, 7], [1, 2, 5], [6], [3, 4]):
        assert torch.equal(choose(q, k, mask, settings, np.array(numbers)), whole[:, :, numbers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in inputs("sharp"))
    found = choose(q, k, masks.causal(LENGTH), XAttention(threshold=0.6))
    assert torch.equal(found, choose(q.float(), k.float(), masks.causal(LENGTH), XAttention(threshold=0.6)))


def test_wrong_settings_are_refused() -> None:
    for name, value in (("stride", 12), ("threshold", 0.0), ("threshold", 1.1)):
        with pytest.raises(ValueError, match=f"attention.sparse.{name}"):
            XAttention(**{name: value})


def test_sets_as_bits() -> None:
    chosen = torch.rand(3, 71, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(members(packed(chosen), torch.arange(71)), chosen)
