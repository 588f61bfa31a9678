"""The Triton kernels under a sparse index: on a CPU in Triton's interpreter, in fp32 and fp16."""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.index_cases import IndexCase, index_cases
from support.oracle import MaskCase, dense_attention, mask_cases, random_qkv
from torch import Tensor

from farspan.kernels import IntervalMask, attend, attend_backward, masks, merge
from farspan.kernels.bits import packed
from farspan.kernels.chunk_index import ChunkIndex
from farspan.kernels.index import Places, Selection
from farspan.kernels.tiles import TILE, TileMap
from farspan.kernels.triton.portable import launch, shapes
from farspan.kernels.triton.selected import SelectedTiles
from farspan.parallel import orders

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = ("causal", "documents", "window")
INDEXES = [case.name for case in index_cases(16, 1, 8)]
PRODUCT = list(product(INDEXES, MASKS, (64, 128), (1, 4, 8)))
# Every 13th case meets each index, mask, head dim and group, and in other pairs each time.
SAMPLE = PRODUCT[::13]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that an element that no kernel writes shows."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def of_mask(name: str, length: int) -> MaskCase:
    return next(case for case in mask_cases(length) if case.name == name)


def of_index(name: str, length: int, heads: int, batch: int = 1) -> IndexCase:
    return next(case for case in index_cases(length, heads, TILE, batch) if case.name == name)


def tensors(length: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE, dtype) for x in random_qkv(length, heads, dim, batch))


def to_device(selection: Selection) -> Selection:
    given = (getattr(selection, field.name) for field in fields(selection))
    return Selection(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in given))


def drawn(tiles: Tensor, columns: Tensor | None, block: int = TILE) -> Selection:
    """Any tiles, bool `[B, H, row tiles, key tiles]`, and columns in slots."""
    row_at, key_at = (torch.arange(count, dtype=torch.int32) for count in tiles.shape[2:])
    keys = torch.arange(len(key_at) * block, dtype=torch.int32)
    return to_device(Selection(tiles.flatten(2), row_at * len(key_at), key_at, columns, keys, block))


def selected(index: IndexCase, rows: Any, keys: Any) -> Selection:
    return to_device(index.index.at(Places.of(rows, keys)))


def run(inputs: tuple[Tensor, ...], mask: IntervalMask, selection: Selection) -> tuple[Tensor, ...]:
    q, k, v, dout = inputs
    mask = mask.to(DEVICE)
    out, lse = attend(q, k, v, mask, index=selection, backend="triton", out_dtype=torch.float32)
    given = {"index": selection, "backend": "triton", "out_dtype": torch.float32}
    return out, lse, *attend_backward(dout, q, k, v, out, lse, mask, **given)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1))


def check(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...], allowed: Tensor) -> None:
    """Against the dense oracle, in all rows; keys that no row computes have gradients of exactly zero."""
    expected = dense_attention(*inputs[:3], allowed.to(DEVICE), inputs[3])
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[inputs[0].dtype]
    (out, lse, *gradients), (wanted_out, wanted_lse, *wanted) = results, expected
    for got, right in zip((out, *gradients), (wanted_out, *wanted), strict=True):
        assert relative(got, right) < bound
    assert torch.equal(lse.isinf(), wanted_lse.isinf())
    assert float((lse - wanted_lse).nan_to_num(0, posinf=0, neginf=0).abs().max()) < 1e-4 + bound
    touched = allowed.any(2).unflatten(1, (inputs[1].shape[2], -1)).any(2).transpose(1, 2).to(DEVICE)
    for gradient in gradients[1:]:
        assert not gradient[~touched.expand(gradient.shape[:3])].any()


def check_whole(
    name: str, mask_name: str, dim: int, group: int, length: int = 290, dtype: torch.dtype = torch.float32
) -> None:
    mask, index = of_mask(mask_name, length), of_index(name, length, group)
    inputs = tensors(length, (group, 1), dim, dtype)
    results = run(inputs, mask.mask, selected(index, range(length), range(length)))
    check(results, inputs, index.selected & mask.allowed[:, None])


@pytest.fixture
def wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block shapes of bf16, which fp32 has no room for on a GPU: fewer steps for the interpreter."""
    if DEVICE == "cpu":
        for shape in (shapes.forward_shape, shapes.dq_shape, shapes.dkdv_shape, shapes.column_shape):
            monkeypatch.setattr(launch, shape.__name__, lambda dim, _, shape=shape: shape(dim, 2))


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize(("name", "mask_name", "dim", "group"), SAMPLE)
def test_equals_the_oracle(name: str, mask_name: str, dim: int, group: int) -> None:
    check_whole(name, mask_name, dim, group)


@pytest.mark.full
@pytest.mark.parametrize(("name", "mask_name", "dim", "group"), [case for case in PRODUCT if case not in SAMPLE])
def test_equals_the_oracle_everywhere(name: str, mask_name: str, dim: int, group: int) -> None:
    check_whole(name, mask_name, dim, group)


@pytest.mark.full
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", INDEXES)
def test_equals_the_oracle_at_greater_length(name: str, mask_name: str) -> None:
    check_whole(name, mask_name, 64, 4, length=1024)


@pytest.mark.parametrize("name", ["some", pytest.param("columns in tiles", marks=pytest.mark.full)])
def test_half_precision(name: str) -> None:
    check_whole(name, "documents", 128, 2, length=512, dtype=torch.float16)


@pytest.mark.parametrize(
    ("order_name", "name", "mask_name"),
    [
        ("striped", "some", "causal"),
        ("zigzag", "columns in tiles", "documents"),
        pytest.param("zigzag", "columns alone", "causal", marks=pytest.mark.full),
        pytest.param("striped", "everything", "window", marks=pytest.mark.full),
    ],
)
def test_pieces_of_two_ranks_accumulate_to_the_whole(order_name: str, name: str, mask_name: str) -> None:
    """The rows of each rank over the keys of each rank; the last slots of the striped order are padding."""
    length = 512 if order_name == "zigzag" else 300
    order = orders.build(order_name, length, 2, TILE)
    mask, index = of_mask(mask_name, length), of_index(name, length, 2)
    inputs = tensors(length, (2, 1), 64, torch.float32)
    q, k, v, dout = ([order.shard(x, rank) for rank in range(2)] for x in inputs)
    pieces = {
        (row, key): (mask.mask.at(at, to).to(DEVICE), selected(index, at, to))
        for (row, at), (key, to) in product(enumerate(order.positions), repeat=2)
    }
    totals = [(torch.zeros_like(x), x.new_full((1, 2, order.slots), float("-inf"))) for x in q]
    sums = [[torch.ones_like(x) for x in shards] for shards in (q, k, v)]
    for (row, key), (seen, selection) in pieces.items():
        attend(q[row], k[key], v[key], seen, index=selection, backend="triton", accumulate=totals[row])
    for (row, key), (seen, selection) in pieces.items():
        given = (dout[row], q[row], k[key], v[key], *totals[row], seen)
        into = (sums[0][row], sums[1][key], sums[2][key])
        attend_backward(*given, index=selection, backend="triton", accumulate=into)
    results = [order.unshard([out for out, _ in totals]), order.unshard([lse for _, lse in totals], 2)]
    results += [order.unshard(shards) - 1 for shards in sums]
    check(tuple(results), inputs, index.selected & mask.allowed[:, None])


@pytest.mark.parametrize(("of_indexes", "of_masks"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.full)])
def test_an_index_or_a_mask_for_each_row_of_the_batch(of_indexes: int, of_masks: int) -> None:
    length = 130
    index = of_index("some", length, 2, batch=of_indexes)
    cases = [of_mask(name, length) for name in ("window", "documents")[:of_masks]]
    inputs = tensors(length, (2, 1), 64, torch.float16, batch=2)
    mask = masks.stack([case.mask for case in cases])
    results = run(inputs, mask, selected(index, range(length), range(length)))
    allowed = index.selected & torch.cat([case.allowed for case in cases])[:, None]
    check(results, inputs, allowed.expand(2, -1, -1, -1))


def test_two_runs_give_the_same_bits() -> None:
    index, mask = of_index("some", 200, 2), masks.causal(200)
    inputs, selection = tensors(200, (2, 1), 64, torch.float16), selected(index, range(200), range(200))
    for first, second in zip(run(inputs, mask, selection), run(inputs, mask, selection), strict=True):
        assert torch.equal(first, second)


def test_tiles_alone_and_columns_alone_merge_to_both() -> None:
    """Where the columns lie in no selected tile, so that nothing is in both."""
    length, heads = 512, 2
    tiles = torch.rand(1, heads, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    tiles[:, :, :, 1:3] = False
    columns = torch.tensor([[[128, 130, 255, 300, length], [256, 257, 300, 301, 383]]], dtype=torch.int32)
    inputs, mask = tensors(length, (heads, 1), 64, torch.float16), masks.causal(length)
    both, of_tiles, of_columns = (drawn(*part) for part in ((tiles, columns), (tiles, None), (tiles & False, columns)))
    out, lse, *gradients = run(inputs, mask, both)
    q, k, v, dout = inputs
    parts = [
        attend(q, k, v, mask.to(DEVICE), index=part, backend="triton", out_dtype=torch.float32)
        for part in (of_tiles, of_columns)
    ]
    for merged in (merge(*parts[0], *parts[1]), merge(*parts[1], *parts[0])):
        assert relative(merged[0], out) < 1e-3
        assert relative(merged[1].nan_to_num(neginf=0), lse.nan_to_num(neginf=0)) < 1e-6
    given = (dout, q, k, v, out, lse, mask.to(DEVICE))
    shares = [
        attend_backward(*given, index=part, backend="triton", out_dtype=torch.float32)
        for part in (of_tiles, of_columns)
    ]
    for whole, share, other in zip(gradients, *shares, strict=True):
        assert relative(share + other, whole) < 1e-5
    assert not shares[1][1][:, :128].any()


def test_rows_of_few_columns_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at great length, where one program would walk over all rows."""
    monkeypatch.setattr(launch, "_COLUMN_ROW_TILES", 1)
    check_whole("columns alone", "causal", 64, 2, dtype=torch.float16)


def test_scores_far_apart_and_rows_that_see_nothing() -> None:
    """Logits that differ by hundreds; every third row is blind."""
    length = 300
    mask, index = of_mask("blind", length), of_index("some", length, 2)
    q, k, v, dout = tensors(length, (2, 1), 64, torch.float32)
    inputs = (30 * q, k, v, dout)
    results = run(inputs, mask.mask, selected(index, range(length), range(length)))
    check(results, inputs, index.selected & mask.allowed[:, None])


@pytest.mark.parametrize("mask_name", ["causal", "star", "blind"])
def test_lists_hold_the_selected_tiles_by_head(mask_name: str) -> None:
    """Without asking the device for anything once the mask's own tiles are known."""
    length, heads, kv_heads = 520, 4, 2
    mask = of_mask(mask_name, length).mask.to(DEVICE)
    index = of_index("some", length, heads, batch=2)
    tiles = TileMap.of(mask, length)
    kinds, _, _ = tiles.kinds, tiles.kind_counts, tiles.spans
    selection = selected(index, range(length), range(length))
    lowered = SelectedTiles(tiles, selection, kv_heads)
    for lists, axes, lines in ((lowered.by_row, (0, 1), heads), (lowered.by_key, (1, 0), kv_heads)):
        assert lists.heads == lines
        own, other = (kinds.shape[1 + axis] for axis in axes)
        for batch, line, tile in np.ndindex(2, lines, own):
            members = range(line * heads // lines, (line + 1) * heads // lines)
            entry = (batch * lines + line) * own + tile
            for kind, start, listed in (
                (2, lists.full_start, lists.full_tiles),
                (1, lists.partial_start, lists.partial_tiles),
            ):
                of_kind = kinds[0].permute(axes)[tile] == kind
                expected = [
                    member * other + number
                    for member, head in enumerate(members)
                    for number in (selection.tiles[batch, head].permute(axes)[tile] & of_kind).nonzero()[:, 0].tolist()
                ]
                assert listed[start[entry] : start[entry + 1]].tolist() == expected
        assert sorted(lists.longest_first[0].tolist()) == list(range(own))


@pytest.mark.parametrize("mask_name", [*MASKS, "star", "blind"])
def test_columns_know_who_may_see_them(mask_name: str) -> None:
    length, block = 700, 16
    case = of_mask(mask_name, length)
    index = of_index("columns in tiles", length, 2)
    selection = selected(index, range(length), range(length))
    lowered = SelectedTiles(TileMap.of(case.mask.to(DEVICE), length), selection, 1)
    columns = lowered.columns
    assert columns is not None
    assert selection.slots is not None
    assert torch.equal(columns.slots, selection.slots)
    (first, stop), (first_tile, stop_tile) = columns.of_row_tiles, columns.of_groups(block)
    for head, tile in np.ndindex(2, -(-length // TILE)):
        seen = case.allowed[0, tile * TILE : (tile + 1) * TILE].any(0)
        slots = columns.slots[0, head].tolist()
        visible = [place for place, slot in enumerate(slots) if slot < length and seen[slot]]
        assert all(first[0, head, tile] <= place < stop[0, head, tile] for place in visible)
        for group in {place // block for place in visible}:
            assert first_tile[0, head, group] <= tile < stop_tile[0, head, group]
        if mask_name == "causal":
            assert stop[0, head, tile] == len(visible)
    for head in range(2):
        expected = {slot: place + 1 for place, slot in enumerate(columns.slots[0, head].tolist()) if slot < length}
        assert columns.places[0, head].tolist() == [expected.get(slot, 0) for slot in range(length + 1)]


def test_lowering_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the device computes is asked for by the host, once the mask's own tiles are known."""
    index, tiles = of_index("some", 300, 2), TileMap.of(masks.causal(300).to(DEVICE), 300)
    lowered = SelectedTiles(tiles, selected(index, range(300), range(300)), 1)
    assert lowered.by_row.heads and lowered.by_key.heads and lowered.columns  # noqa: PT018

    def waits(*_: Any, **__: Any) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("tiles", "columns", "ranges", "groups"):
        monkeypatch.setattr(f"farspan.kernels.triton.selected.{name}_kernel", _Unlaunched())
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__", "cpu"):
        monkeypatch.setattr(Tensor, name, waits)
    again = SelectedTiles(tiles, lowered.selection, 1)
    columns = (again.by_row, again.by_key, again.columns)[2]
    assert columns is not None
    columns.of_row_tiles, columns.of_groups(64)


class _Unlaunched:
    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: None


def test_another_block_is_refused_in_one_line() -> None:
    q = torch.zeros(1, 64, 1, 64, device=DEVICE)
    selection = drawn(torch.ones(1, 1, 1, 1, dtype=torch.bool), None, 64)
    with pytest.raises(ValueError, match=r"a sparse index of 128-token tiles, got one of 64; set it to auto") as caught:
        attend(q, q, q, masks.causal(64).to(DEVICE), index=selection, backend="triton")
    assert "\n" not in str(caught.value)


def chunk_case(length: int, heads: int, chunk: int, batch: int = 1) -> tuple[ChunkIndex, Tensor]:
    """An index of chunks by draw, a row's own always among them, and what it selects by definition."""
    generator = torch.Generator().manual_seed(length)
    blocks, position = -(-length // TILE), torch.arange(length)
    chosen = torch.rand(batch, heads, blocks * TILE, -(-length // chunk), generator=generator) < 0.4
    chosen[:, :, torch.arange(blocks * TILE), (torch.arange(blocks * TILE) // chunk).clamp(max=chosen.shape[3] - 1)] = (
        True
    )
    chosen[:, :, length:] = False
    index = ChunkIndex(packed(chosen).transpose(2, 3).contiguous(), length, chunk)
    return index, chosen[:, :, :length][..., position // chunk]


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize(
    ("mask_name", "dim", "group", "chunk", "batch"),
    [("causal", 64, 4, 128, 1), ("documents", 64, 1, 256, 2), ("window", 128, 2, 128, 1), ("causal", 128, 1, 256, 1)],
)
def test_each_row_computes_its_chunks(mask_name: str, dim: int, group: int, chunk: int, batch: int) -> None:
    length = 290
    mask, (index, chosen) = of_mask(mask_name, length), chunk_case(length, group, chunk, batch)
    inputs = tensors(length, (group, 1), dim, torch.float32, batch)
    selection = to_device(index.at(Places.of(range(length), range(length))))
    check(run(inputs, mask.mask, selection), inputs, chosen & mask.allowed[:, None])


@pytest.mark.usefixtures("wide_blocks")
def test_each_row_computes_its_chunks_of_a_piece() -> None:
    """The rows of one rank against the keys of another, whose tiles are no neighbours."""
    length, world = 8 * TILE, 2
    order, mask, (index, chosen) = orders.striped(length, world, TILE), masks.causal(length), chunk_case(length, 2, 256)
    rows, keys = order.positions[1], order.positions[0]
    inputs = tensors(length // world, (2, 1), 64, torch.float32)
    seen = mask.visible(slice(0, length), slice(0, length))[:, rows][:, :, keys]
    selection = to_device(index.at(Places.of(rows, keys)))
    check(run(inputs, mask.at(rows, keys), selection), inputs, chosen[:, :, rows][..., keys] & seen[:, None])
