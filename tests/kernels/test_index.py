from __future__ import annotations

import numpy as np
import pytest
import torch
from support.index_cases import index_cases
from support.oracle import dense_attention, difference, mask_cases, random_qkv

from farspan.kernels import attend, attend_backward, masks, merge
from farspan.kernels.bits import packed
from farspan.kernels.block_index import BlockIndex
from farspan.kernels.chunk_index import ChunkIndex
from farspan.kernels.index import Places
from farspan.kernels.row_blocks import RowBlocks
from farspan.parallel import orders

LENGTH, BLOCK, HEADS = 61, 8, (4, 2)
NAMES = [case.name for case in index_cases(LENGTH, HEADS[0], BLOCK)]


@pytest.mark.parametrize("mask_name", ["causal", "documents", "window"])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_computes_what_is_selected_and_visible(name: str, mask_name: str) -> None:
    mask = next(case for case in mask_cases(LENGTH) if case.name == mask_name)
    case = next(case for case in index_cases(LENGTH, HEADS[0], BLOCK, batch=2) if case.name == name)
    places = Places.of(range(LENGTH), range(LENGTH), BLOCK)
    q, k, v, dout = random_qkv(LENGTH, HEADS, 8, batch=2)
    selection = case.index.at(places)
    out, lse = attend(q, k, v, mask.mask, index=selection)
    gradients = attend_backward(dout, q, k, v, out, lse, mask.mask, index=selection)
    expected = dense_attention(q, k, v, case.selected & mask.allowed[:, None], dout)
    for got, wanted in zip((out, lse, *gradients), expected, strict=True):
        assert difference(got, wanted) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_dense_form_and_density_are_by_definition(name: str) -> None:
    case = next(case for case in index_cases(LENGTH, HEADS[0], BLOCK) if case.name == name)
    assert torch.equal(case.index.to_dense(), case.selected.tril())
    blocks = -(-LENGTH // BLOCK)
    row, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
    tiles = case.index.diagonals[:, :, (row - key).clamp(min=0)] & (row >= key)
    share = tiles.sum((2, 3)).double() / (row >= key).sum()
    assert torch.allclose(case.index.density(), share, atol=1e-15)


@pytest.mark.parametrize("order_name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [2, 3])
def test_pieces_of_any_aligned_order_make_up_the_whole(order_name: str, world: int) -> None:
    """Every rank's rows against every rank's keys, merged; rows and columns of padding are nobody's."""
    length = 2 * world * BLOCK * 2
    order = orders.build(order_name, length, world, stripe=BLOCK)
    mask = masks.causal(length)
    q, k, v, dout = random_qkv(length, HEADS, 8)
    for case in index_cases(length, HEADS[0], BLOCK):
        expected = dense_attention(
            q, k, v, case.selected & mask.visible(slice(0, length), slice(0, length))[:, None], dout
        )
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rank in range(world):
            rows = order.positions[rank]
            pieces = []
            for source in range(world):
                keys = order.positions[source]
                places = Places.of(rows, keys, BLOCK)
                pieces.append((keys, mask.at(rows, keys), case.index.at(places)))
            parts = [attend(q[:, rows], k[:, keys], v[:, keys], m, index=i) for keys, m, i in pieces]
            out, lse = parts[0]
            for part in parts[1:]:
                out, lse = merge(out, lse, *part)
            assert difference(out, expected[0][:, rows]) < 1e-12
            assert difference(lse, expected[1][:, :, rows]) < 1e-12
            dq = torch.zeros_like(q[:, rows])
            for keys, m, i in pieces:
                given = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out, lse, m)
                _, of_keys, of_values = attend_backward(*given, index=i, accumulate=(dq, None, None))
                dk[:, keys] += of_keys
                dv[:, keys] += of_values
            assert difference(dq, expected[2][:, rows]) < 1e-12
        assert difference(dk, expected[3]) < 1e-12
        assert difference(dv, expected[4]) < 1e-12


def test_some_heads_of_an_index() -> None:
    case = index_cases(LENGTH, 6, BLOCK)[0]
    places = Places.of(range(LENGTH), range(LENGTH), BLOCK)
    whole = slice(0, LENGTH)
    some = case.index.at(places, (2, 5)).visible(whole, whole)
    assert torch.equal(some, case.index.at(places).visible(whole, whole)[:, 2:5])


def test_a_block_index_selects_its_tiles() -> None:
    blocks = -(-LENGTH // BLOCK)
    tiles = torch.rand(1, HEADS[0], blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.4
    index = BlockIndex.of(tiles, LENGTH, BLOCK)
    position = torch.arange(LENGTH) // BLOCK
    dense = tiles[:, :, position][:, :, :, position].tril()
    assert torch.equal(index.to_dense(), dense)
    assert torch.equal(index.density(), tiles.tril().sum((2, 3)).double() / (blocks * (blocks + 1) // 2))
    rows, keys = torch.tensor([0, 9, 33, 60]), torch.arange(3, 61, 4)
    assert torch.equal(index.selects(rows, keys) & (keys <= rows[:, None]), dense[:, :, rows][..., keys])
    with pytest.raises(ValueError, match=r"over 61 tokens has 8 sets of blocks"):
        BlockIndex(index.words[:, :, :5], LENGTH, BLOCK)


@pytest.mark.parametrize("mask_name", ["causal", "documents", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_groups_of_rows_read_the_blocks_that_they_compute_something_of(name: str, mask_name: str) -> None:
    """By definition, but for tiles that the mask hides in part: there a block may be named in vain."""
    mask = next(case for case in mask_cases(LENGTH) if case.name == mask_name)
    case = next(case for case in index_cases(LENGTH, HEADS[0], BLOCK, batch=2) if case.name == name)
    groups = [np.array(members) for members in ([0, 3, 6], [1, 4, 7], [2], [5])]
    found = case.index.reads(RowBlocks.of(groups, mask.mask, BLOCK, "cpu"), HEADS[1])
    blocks, padding = -(-LENGTH // BLOCK), (0, -LENGTH % BLOCK) * 2

    def by_block(pairs: torch.Tensor) -> torch.Tensor:
        tiles = torch.nn.functional.pad(pairs, padding).unflatten(-1, (blocks, BLOCK)).unflatten(-3, (blocks, BLOCK))
        return tiles.any(-1).any(-2)

    computed = (case.selected & mask.allowed[:, None]).unflatten(1, (HEADS[1], -1)).any(2)
    tile = (by_block(case.selected) & by_block(mask.allowed)[:, None]).unflatten(1, (HEADS[1], -1)).any(2)
    for group, members in enumerate(groups):
        read = found[:, :, group]
        assert not (by_block(computed)[:, :, members].any(2) & ~read).any()
        if mask_name != "documents":
            assert torch.equal(read, tile[:, :, members].any(2))


def test_tiles_that_are_not_blocks_of_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set parallel.order to striped"):
        Places.of(np.arange(4, 20), np.arange(16), BLOCK)
    with pytest.raises(ValueError, match=r"set parallel.order to striped"):
        Places.of(np.arange(0, 32, 2), np.arange(16), BLOCK)


def test_an_index_that_does_not_fit_is_refused() -> None:
    case = index_cases(LENGTH, 2, BLOCK)[0]
    q, k, v, _ = random_qkv(LENGTH, HEADS, 8)
    with pytest.raises(ValueError, match=r"does not fit q"):
        attend(q, k, v, masks.causal(LENGTH), index=case.index.at(Places.of(range(LENGTH), range(LENGTH), BLOCK)))


def test_groups_read_the_tiles_and_the_chunks_of_other_indexes() -> None:
    """`reads` of an index of tiles, and of one of chunks of two blocks that each row chooses by itself."""
    generator, length, block = torch.Generator().manual_seed(2), 8 * BLOCK, BLOCK
    mask, blocks = masks.causal(length), torch.arange(8)
    tiles = (torch.rand(1, 4, 8, 8, generator=generator) < 0.3).tril() | torch.eye(8, dtype=torch.bool)
    chunks = torch.rand(1, 4, length, 4, generator=generator) < 0.1
    chunks &= torch.arange(4) <= torch.arange(length)[:, None] // (2 * block)
    chunks[:, :, torch.arange(length), torch.arange(length) // (2 * block)] = True
    by_chunk = ChunkIndex(packed(chunks).transpose(2, 3), length, 2 * block, block)
    chosen = chunks[..., blocks // 2].unflatten(2, (8, block)).any(3) & (blocks <= blocks[:, None])
    rows = RowBlocks.of([np.array([0, 5]), np.array([2]), np.array([7, 3, 1])], mask, block, "cpu")
    for index, expected in ((BlockIndex.of(tiles, length, block), tiles), (by_chunk, chosen)):
        of_kv = expected.unflatten(1, (2, -1)).any(2)
        found = index.reads(rows, 2)
        for group, members in enumerate(([0, 5], [2], [7, 3, 1])):
            assert torch.equal(found[:, :, group], of_kv[:, :, members].any(2))
