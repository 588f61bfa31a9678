from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import mask_cases
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.kernels.tiles import TILE, TileLists, TileMap


def brute_force(mask: IntervalMask, keys: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(mask row, row tile, key tile) of full and of partial tiles, element by element."""
    seen = mask.visible(slice(0, mask.rows), slice(0, keys))
    full, partial = [], []
    for batch in range(mask.batch):
        for row in range(-(-mask.rows // TILE)):
            for key in range(-(-keys // TILE)):
                tile = seen[batch, row * TILE : (row + 1) * TILE, key * TILE : (key + 1) * TILE]
                if tile.all() and tile.shape[1] == TILE:
                    full.append((batch, row, key))
                elif tile.any():
                    partial.append((batch, row, key))
    return full, partial


def unpack(start: Tensor, tiles: Tensor, lists: int) -> list[tuple[int, int, int]]:
    """(mask row, own tile, other tile) in the order of the lists."""
    bounds = start.tolist()
    return [
        (i // lists, i % lists, tile)
        for i in range(len(bounds) - 1)
        for tile in tiles[bounds[i] : bounds[i + 1]].tolist()
    ]


def check(mask: IntervalMask, keys: int) -> None:
    tiles = TileMap.of(mask, keys)
    full, partial = brute_force(mask, keys)
    row_tiles, key_tiles = -(-mask.rows // TILE), -(-keys // TILE)
    assert unpack(tiles.by_row.full_start, tiles.by_row.full_tiles, row_tiles) == full
    assert unpack(tiles.by_row.partial_start, tiles.by_row.partial_tiles, row_tiles) == partial

    def turned(entries: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        return sorted((batch, key, row) for batch, row, key in entries)

    assert unpack(tiles.by_key.full_start, tiles.by_key.full_tiles, key_tiles) == turned(full)
    assert unpack(tiles.by_key.partial_start, tiles.by_key.partial_tiles, key_tiles) == turned(partial)
    assert tiles.active_tiles == len(full) + len(partial)
    assert tiles.pairs == mask.visible(slice(0, mask.rows), slice(0, keys)).sum()
    for lists, count in ((tiles.by_row, row_tiles), (tiles.by_key, key_tiles)):
        check_order(lists, count)


def check_order(lists: TileLists, count: int) -> None:
    work = (lists.full_start.diff() + lists.partial_start.diff()).view(-1, count)
    in_order = work.gather(1, lists.longest_first.long())
    assert (in_order.diff(dim=1) <= 0).all()
    assert all(sorted(order) == list(range(count)) for order in lists.longest_first.tolist())


@st.composite
def random_masks(draw: st.DrawFn) -> tuple[IntervalMask, int]:
    """Bounds that change from run to run of rows, any intervals, batches of masks, rows that see nothing."""
    rows, keys, batch = draw(st.integers(1, 400)), draw(st.integers(1, 400)), draw(st.integers(1, 2))
    bounds = torch.zeros(4, batch, rows, dtype=torch.int32)
    bound = st.integers(0, keys) | st.sampled_from([x for x in (0, TILE, 2 * TILE, keys) if x <= keys])
    for b in range(batch):
        row = 0
        while row < rows:
            stop = min(rows, row + draw(st.integers(1, 200)))
            bounds[:, b, row:stop] = torch.tensor([draw(bound) for _ in range(4)])[:, None]
            if draw(st.booleans()):  # the end moves with the row, as under a causal mask
                bounds[1, b, row:stop] += torch.arange(stop - row, dtype=torch.int32)
            row = stop
    return IntervalMask(*bounds.clamp(max=keys)), keys


@settings(max_examples=200, deadline=None)
@given(random_masks())
def test_any_mask_equals_brute_force(case: tuple[IntervalMask, int]) -> None:
    check(*case)


@pytest.mark.parametrize("name", [case.name for case in mask_cases(16)])
def test_builders_and_their_shards(name: str) -> None:
    length = 300
    mask = next(case.mask for case in mask_cases(length) if case.name == name)
    check(mask, length)
    check(mask.at(range(0, length, 2), range(1, length, 2)), length // 2)


def test_causal_and_full_need_no_lists() -> None:
    assert TileMap.of(masks.causal(300), 300).offset == 0
    assert TileMap.of(masks.full(300), 300).offset == 300
    assert TileMap.of(masks.causal(300).at(range(100, 300), range(300)), 300).offset == 100
    # A striped ring's later stages: row i sees the keys before i.
    assert TileMap.of(masks.causal(300).at(range(0, 300, 2), range(1, 300, 2)), 150).offset == -1
    assert TileMap.of(masks.causal(300).at(range(50), range(100)), 100).offset == 0
    assert TileMap.of(masks.sliding_window(300, 50), 300).offset is None


def test_counts_flops_of_visible_pairs_for_the_whole_batch() -> None:
    tiles = TileMap.of(masks.causal(200), 200)
    assert tiles.flops(heads=8, head_dim=64, batch=3) == 3 * 4 * 8 * 64 * 200 * 201 // 2


def test_is_built_once_a_mask_and_refuses_too_few_keys() -> None:
    mask = masks.causal(300)
    assert TileMap.of(mask, 300) is TileMap.of(mask, 300)
    with pytest.raises(ValueError, match="sees keys up to 300 was given 299 keys"):
        TileMap.of(mask, 299)
