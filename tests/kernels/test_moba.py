"""MoBA's choice, and the attention that follows from it, against the definition in dense fp64 matrices."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.block_choices import moba_allowed, moba_gates
from support.oracle import dense_attention, difference, random_qkv
from torch import Tensor

from farspan.kernels import IntervalMask, attend, attend_backward, masks
from farspan.kernels.chunk_index import ChunkIndex
from farspan.kernels.estimate import MoBA
from farspan.kernels.estimate.moba import ChunkSight, block_sums, chunks_count, moba
from farspan.kernels.index import Places
from farspan.kernels.tiles import TILE

LENGTH = 1019
WHOLE = slice(0, LENGTH)


def words(q: Tensor, k: Tensor, mask: IntervalMask, settings: MoBA, numbers: np.ndarray) -> Tensor:
    counts = torch.from_numpy(chunks_count(mask, settings.chunk))[..., None, None]

    def blocks(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -mask.rows % TILE))
        return x.unflatten(1, (-1, TILE)).movedim(1, 0)

    sums = block_sums(blocks(torch.where(counts, k, 0)))
    return moba(blocks(q)[numbers], sums, ChunkSight.of(mask, numbers, settings.chunk), settings)


def choose(q: Tensor, k: Tensor, mask: IntervalMask, settings: MoBA) -> ChunkIndex:
    found = words(q, k, mask, settings, np.arange(-(-mask.rows // TILE)))
    return ChunkIndex(found.permute(1, 2, 3, 0, 4).flatten(3), mask.rows, settings.chunk)


def inputs(heads: tuple[int, int] = (4, 2), batch: int = 1, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(batch, length, h, 16, generator=generator) for h in heads)  # type: ignore[return-value]


def defined(q: Tensor, k: Tensor, settings: MoBA) -> Tensor:
    """Bool `[H, N, N]` of one document."""
    group = q.shape[1] // k.shape[1]
    gates = [moba_gates(q[:, h], k[:, h // group], settings.chunk) for h in range(q.shape[1])]
    return torch.stack([moba_allowed(of_head, settings.chunk, settings.top_k) for of_head in gates])


@pytest.mark.parametrize(("chunk", "top_k"), [(128, 3), (128, 1), (256, 2), (384, 2), (256, 9)])
def test_equals_the_definition(chunk: int, top_k: int) -> None:
    q, k = inputs()
    settings = MoBA(chunk, top_k)
    assert torch.equal(choose(q, k, masks.causal(LENGTH), settings).to_dense()[0], defined(q[0], k[0], settings))


def test_more_chunks_than_bits_of_a_word() -> None:
    length = 40 * TILE + 5
    q, k = inputs((2, 1), length=length)
    settings = MoBA(TILE, 6)
    index = choose(q, k, masks.causal(length), settings)
    assert index.words.shape[2] == 2
    assert torch.equal(index.to_dense()[0], defined(q[0], k[0], settings))


def test_attention_and_its_gradient_are_those_of_the_definition() -> None:
    """The gate is constant: the gradient is that of attention under the chosen mask."""
    q, k, v, dout = random_qkv(LENGTH, (4, 2), 16)
    settings, mask = MoBA(128, 3), masks.causal(LENGTH)
    selection = choose(q, k, mask, settings).at(Places.of(range(LENGTH), range(LENGTH)))
    out, lse = attend(q, k, v, mask, index=selection)
    gradients = attend_backward(dout, q, k, v, out, lse, mask, index=selection)
    expected = dense_attention(q, k, v, defined(q[0], k[0], settings)[None], dout)
    for got, wanted in zip((out, lse, *gradients), expected, strict=True):
        assert difference(got, wanted) < 1e-12


def test_of_equal_gates_the_earlier_chunk_is_chosen() -> None:
    q, k = torch.ones(1, 1024, 2, 8), torch.ones(1, 1024, 1, 8)
    q[:, :, 1] = 0.0  # whose products are 0 and -0
    k[:, 200:300] = -1.0
    k[:, 300:] = 0.5
    k[:, 128:256], k[:, :128] = -0.0, 0.0
    dense = choose(q, k, masks.causal(1024), MoBA(128, 3)).to_dense()[0, :, 1000]
    assert dense[1].nonzero().flatten().tolist() == [*range(256), *range(896, 1001)]
    assert dense[0].nonzero().flatten().tolist() == [*range(384, 640), *range(896, 1001)]


def test_documents_that_begin_with_chunks_are_chosen_for_by_themselves() -> None:
    bounds, settings = [0, 512, 768, LENGTH], MoBA(128, 2)
    q, k = inputs()
    mask = masks.causal(LENGTH, bounds)
    found = choose(q, k, mask, settings).to_dense()[0] & mask.visible(WHOLE, WHOLE)
    for first, last in pairwise(bounds):
        rows = slice(first, last)
        assert torch.equal(found[:, rows, rows], defined(q[0, rows], k[0, rows], settings))


@pytest.mark.parametrize("bound", [300, 255, 257, 640])
def test_a_chunk_is_what_a_token_sees_of_it(bound: int) -> None:
    """A document that begins within a chunk: the mean of its own tokens there, and nothing of the document before."""
    settings = MoBA(128, 3)
    q, k = inputs()
    found = choose(q, k, masks.causal(LENGTH, [0, bound, LENGTH]), settings).to_dense()[0]
    chunks = range(bound // 128 * 128, LENGTH, 128)
    for h in range(4):
        means = torch.stack([k[0, max(c, bound) : c + 128, h // 2].double().mean(0) for c in chunks])
        for row in range(bound, LENGTH):
            own = row // 128 - bound // 128
            order = (means[:own] @ q[0, row, h].double()).argsort(descending=True)[:2].tolist()
            wanted = {chunks[i] // 128 for i in (own, *order)}
            assert set((found[h, row].nonzero().flatten() // 128).tolist()) == wanted


def test_rows_of_a_batch_are_chosen_for_by_themselves() -> None:
    q, k = inputs(batch=2)
    of_rows = [masks.causal(LENGTH, [0, 450, LENGTH]), masks.causal(LENGTH)]
    found = choose(q, k, masks.stack(of_rows), MoBA(128, 2)).words
    for b, mask in enumerate(of_rows):
        assert torch.equal(found[b : b + 1], choose(q[b : b + 1], k[b : b + 1], mask, MoBA(128, 2)).words)
    assert torch.equal(choose(q, k, masks.causal(LENGTH), MoBA(128, 2)).words[1], found[1])


def test_a_block_is_chosen_for_alike_beside_any_others() -> None:
    q, k = inputs((6, 2))
    mask, settings = masks.causal(LENGTH), MoBA(256, 2)
    whole = words(q, k, mask, settings, np.arange(8))
    for numbers in ([0, 7], [1, 2, 5], [6], [3, 4]):
        assert torch.equal(words(q, k, mask, settings, np.array(numbers)), whole[numbers])


def test_density_and_selects_are_by_definition() -> None:
    q, k = inputs(batch=2)
    index = choose(q, k, masks.causal(LENGTH), MoBA(256, 2))
    dense, blocks = index.to_dense(), -(-LENGTH // TILE)
    padded = torch.nn.functional.pad(dense, (0, -LENGTH % TILE, 0, -LENGTH % TILE))
    tiles = padded.unflatten(3, (blocks, TILE)).unflatten(2, (blocks, TILE)).any(5).any(3)
    assert torch.equal(index.density(), tiles.sum((2, 3)).double() / (blocks * (blocks + 1) // 2))
    rows, keys = torch.tensor([3, 400, 401, 1018]), torch.arange(100, 900, 7)
    causal = keys <= rows[:, None]
    assert torch.equal(index.selects(rows, keys) & causal, dense[:, :, rows][..., keys])


def test_an_index_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="chunks of 256 tokens over 1019"):
        ChunkIndex(torch.zeros(1, 1, 1, 1000, dtype=torch.int32), LENGTH, 256)


def test_wrong_settings_are_refused() -> None:
    for name, value in (("chunk", 100), ("chunk", 0), ("top_k", 0)):
        with pytest.raises(ValueError, match=f"attention.sparse.{name}"):
            MoBA(**{name: value})
