"""Launching the portable kernels: descriptors, block shapes, grids."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from farspan.kernels.tiles import TILE
from farspan.kernels.triton.portable.backward import dkdv_kernel, dq_kernel
from farspan.kernels.triton.portable.columns import column_kernel
from farspan.kernels.triton.portable.forward import forward_kernel
from farspan.kernels.triton.portable.shapes import Shape, column_shape, dkdv_shape, dq_shape, forward_shape
from farspan.kernels.triton.selected import Columns, SelectedTiles, Tiles
from farspan.kernels.triton.tensors import rows_in_steps_of_16_bytes, strided

_OF_COLUMNS = (
    *("column_slots", "column_at", "columns_stride_b", "table", "table_stride_b", "table_stride_h", "table_places"),
    *("row_at", "most"),
)
# Programs that keep a large GPU busy several times over: heads with few columns share out their rows.
_COLUMN_PROGRAMS = 1024
# Row tiles that are worth a program.
_COLUMN_ROW_TILES = 16


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool,
    columns_alone: bool = False,
) -> None:
    """Writes out `[B, S, H, Dv]` and lse `[B, H, S]`, or merges into them; of all, or of single columns alone."""
    batch, rows, heads, _ = q.shape
    shape = forward_shape(_widest(q, v), q.itemsize)
    forward_kernel[(_blocks(rows, shape.block_m, tiles), heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        *strided(out, (0, 2, 1)),
        *strided(lse, (0, 1)),
        **_lists(tiles, True, columns_alone),
        **_columns(k, v, tiles),
        **_chunks(tiles),
        rows=rows,
        keys=k.shape[1],
        **_constants(q, k, v, scale, shape),
        TILES=not columns_alone,
        ACCUMULATE=accumulate,
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: Tiles,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
    accumulate: tuple[bool, bool, bool],
    columns_alone: bool = False,
) -> None:
    """Writes dq, dk and dv, or adds to them; of all, or of single columns alone."""
    dq, dk, dv = gradients
    gradient_of_queries(dout, q, k, v, lse, delta, tiles, scale, dq, accumulate[0], columns_alone)
    gradients_of_keys(dout, q, k, v, lse, delta, tiles, scale, dk, dv, accumulate[1:], columns_alone)


def gradient_of_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: Tiles,
    scale: float,
    dq: Tensor,
    accumulate: bool,
    columns_alone: bool = False,
) -> None:
    batch, rows, heads, _ = q.shape
    shape = dq_shape(_widest(q, v), q.itemsize)
    dq_kernel[(_blocks(rows, shape.block_m, tiles), heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        _descriptor(dout, shape.block_m),
        *strided(lse, (0, 1)),
        *strided(delta, (0, 1)),
        *strided(dq, (0, 2, 1)),
        **_lists(tiles, True, columns_alone),
        **_columns(k, v, tiles),
        **_chunks(tiles),
        rows=rows,
        keys=k.shape[1],
        scale=scale,
        **_constants(q, k, v, scale, shape),
        TILES=not columns_alone,
        ACCUMULATE=accumulate,
    )


def gradients_of_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: Tiles,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    accumulate: tuple[bool, bool],
    columns_alone: bool = False,
) -> None:
    batch, keys, kv_heads, _ = k.shape
    of_columns = gradients_of_columns(dout, q, k, v, lse, delta, tiles, scale)
    shape = dkdv_shape(_widest(q, v), q.itemsize)
    dkdv_kernel[(_blocks(keys, shape.block_n, tiles), kv_heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        _descriptor(dout, shape.block_m),
        *strided(lse, (0, 1)),
        *strided(delta, (0, 1)),
        *strided(dk, (0, 2, 1)),
        *strided(dv, (0, 2, 1)),
        **_lists(tiles, False, columns_alone),
        **of_columns,
        **_chunks(tiles),
        rows=q.shape[1],
        keys=keys,
        scale=scale,
        **_constants(q, k, v, scale, shape),
        TILES=not columns_alone,
        SPARSE=isinstance(tiles, SelectedTiles),
        COLUMNS=bool(of_columns["most"]),
        ACCUMULATE_DK=accumulate[0],
        ACCUMULATE_DV=accumulate[1],
    )


def gradients_of_columns(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: Tiles,
    scale: float,
) -> dict[str, Any]:
    """What each query head gives to dk / scale and dv of its columns, fp32 `[B, H, most, D]`, and where these are."""
    columns = tiles.columns if isinstance(tiles, SelectedTiles) else None
    if columns is None:
        return {**dict.fromkeys(("column_places", "columns_stride_b", "dk_columns", "dv_columns")), "most": 0}
    batch, rows, heads, _ = q.shape
    shape = column_shape(_widest(q, v), q.itemsize)
    groups = triton.cdiv(columns.most, shape.block_n)
    shares = min(_COLUMN_PROGRAMS // (groups * heads * batch), triton.cdiv(rows, TILE * _COLUMN_ROW_TILES))
    shares = max(shares, 1)
    dk, dv = (q.new_empty(shares, batch, heads, columns.most, x.shape[3], dtype=torch.float32) for x in (k, v))
    column_kernel[(groups * shares, heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(dout, shape.block_m),
        *strided(rows_in_steps_of_16_bytes(k), (0, 2, 1)),
        *strided(rows_in_steps_of_16_bytes(v), (0, 2, 1)),
        *strided(lse, (0, 1)),
        *strided(delta, (0, 1)),
        dk,
        dv,
        *tiles.mask.bounds,
        int(tiles.mask.batch > 1),
        **_of_columns(columns),
        **dict(zip(("first_tile", "stop_tile"), columns.of_groups(shape.block_n))),
        shares=shares,
        rows=rows,
        keys=k.shape[1],
        **_constants(q, k, v, scale, shape),
    )
    return {
        "column_places": columns.places,
        "columns_stride_b": heads if len(columns.slots) > 1 else 0,
        "dk_columns": dk.sum(0),
        "dv_columns": dv.sum(0),
        "most": columns.most,
    }


def _blocks(length: int, block: int, tiles: Tiles) -> int:
    """Programs along one side. Lists start tiles in an order of their own, so that a last one counts as whole."""
    return triton.cdiv(length, block) if tiles.offset is not None else triton.cdiv(length, TILE) * (TILE // block)


def _lists(tiles: Tiles, by_row: bool, unread: bool) -> dict[str, Any]:
    """The mask's bounds, the lists of one side, and the steps between rows of both."""
    mask = tiles.mask
    bounds = dict(zip(("begin", "end", "anchor_begin", "anchor_end"), mask.bounds))
    names = ("full_start", "full_tiles", "partial_start", "partial_tiles", "longest_first")
    common = {**bounds, "mask_stride": int(mask.batch > 1), "LISTS": tiles.offset is None}
    if tiles.offset is not None or unread:
        nothing = {**dict.fromkeys(names, mask.begin), "lists_stride_b": 0, "lists_stride_h": 0}
        if isinstance(tiles, SelectedTiles):
            nothing["longest_first"] = tiles.of_mask.row_order if by_row else tiles.of_mask.key_order
        return {**common, **nothing, "offset": tiles.offset or 0}
    lists = tiles.by_row if by_row else tiles.by_key
    strides = dict(zip(("lists_stride_b", "lists_stride_h"), lists.strides))
    return {**common, **{name: getattr(lists, name) for name in names}, **strides, "offset": 0}


def _columns(k: Tensor, v: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What the kernels over rows need of a sparse index's columns."""
    columns = tiles.columns if isinstance(tiles, SelectedTiles) else None
    names = ("k_rows", "k_stride_b", "k_stride_h", "k_stride_s", "v_rows", "v_stride_b", "v_stride_h", "v_stride_s")
    if columns is None:
        return {**dict.fromkeys((*names, *_OF_COLUMNS, "column_first", "column_stop")), "COLUMNS": False}
    rows = (*strided(rows_in_steps_of_16_bytes(k), (0, 2, 1)), *strided(rows_in_steps_of_16_bytes(v), (0, 2, 1)))
    ranges = dict(zip(("column_first", "column_stop"), columns.of_row_tiles))
    return {**dict(zip(names, rows)), **_of_columns(columns), **ranges, "COLUMNS": True}


def _chunks(tiles: Tiles) -> dict[str, Any]:
    """What the kernels over tiles need of a sparse index's chunks."""
    names = ("chunks", "chunks_stride_b", "chunks_stride_h", "key_at")
    selection = tiles.selection if isinstance(tiles, SelectedTiles) else None
    if selection is None or selection.chunks is None:
        return {**dict.fromkeys(names), "CHUNKS": False}
    chunks = selection.chunks.contiguous()
    strides = chunks.stride(0) if len(chunks) > 1 else 0, chunks.stride(1)
    return {**dict(zip(names, (chunks, *strides, selection.key_at))), "CHUNKS": True}


def _of_columns(columns: Columns) -> dict[str, Any]:
    selection = columns.selection
    table = selection.table
    heads = table.shape[1]
    of_slots = (columns.slots, columns.at, heads if len(columns.slots) > 1 else 0)
    of_table = (table.view(torch.uint8), table.stride(0) if len(table) > 1 else 0, table.stride(1), table.shape[2])
    return dict(zip(_OF_COLUMNS, (*of_slots, *of_table, selection.row_at, columns.most)))


def _constants(q: Tensor, k: Tensor, v: Tensor, scale: float, shape: Shape) -> dict[str, Any]:
    return {
        "scale_log2": scale * math.log2(math.e),
        "GROUP": q.shape[2] // k.shape[2],
        "PRECISION": "ieee",
        "DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "PADDED_DIM": _padded(q.shape[3]),
        "PADDED_VALUE_DIM": _padded(v.shape[3]),
        "TILE": TILE,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """`[B, S, H, D]` as `[B, H, S, D]`, loaded `block` rows at a time; past the ends it reads zeros."""
    x = rows_in_steps_of_16_bytes(x).transpose(1, 2)
    # The strides of dims of size 1 mean nothing, but the hardware checks them.
    strides = [stride if size > 1 else x.shape[3] * 8 for size, stride in zip(x.shape[:3], x.stride()[:3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, _padded(x.shape[3])])


def _widest(q: Tensor, v: Tensor) -> int:
    return _padded(max(q.shape[3], v.shape[3]))


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
