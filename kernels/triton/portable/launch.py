"""Launching the portable kernels: descriptors, block shapes, grids."""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from farspan.kernels.tiles import TILE, TileLists, TileMap
from farspan.kernels.triton.portable.backward import dkdv_kernel, dq_kernel
from farspan.kernels.triton.portable.forward import forward_kernel
from farspan.kernels.triton.portable.shapes import Shape, dkdv_shape, dq_shape, forward_shape
from farspan.kernels.triton.tensors import rows_in_steps_of_16_bytes, strided


def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileMap, scale: float, out: Tensor, lse: Tensor, accumulate: bool
) -> None:
    """Writes out `[B, S, H, Dv]` and lse `[B, H, S]`, or merges into them."""
    batch, rows, heads, _ = q.shape
    shape = forward_shape(_widest(q, v), q.itemsize)
    forward_kernel[(_blocks(rows, shape.block_m, tiles), heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        *strided(out, (0, 2, 1)),
        *strided(lse, (0, 1)),
        *_mask_arguments(tiles, by_row=True),
        rows=rows,
        keys=k.shape[1],
        **_constants(q, k, v, tiles, scale, shape),
        VALUE_DIM=v.shape[3],
        ACCUMULATE=accumulate,
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: TileMap,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
    accumulate: tuple[bool, bool, bool],
) -> None:
    """Writes dq, dk and dv, or adds to them."""
    dq, dk, dv = gradients
    gradient_of_queries(dout, q, k, v, lse, delta, tiles, scale, dq, accumulate[0])
    gradients_of_keys(dout, q, k, v, lse, delta, tiles, scale, dk, dv, accumulate[1:])


def gradient_of_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: TileMap,
    scale: float,
    dq: Tensor,
    accumulate: bool,
) -> None:
    batch, rows, heads, dim = q.shape
    shape = dq_shape(_widest(q, v), q.itemsize)
    dq_kernel[(_blocks(rows, shape.block_m, tiles), heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        _descriptor(dout, shape.block_m),
        *strided(lse, (0, 1)),
        *strided(delta, (0, 1)),
        *strided(dq, (0, 2, 1)),
        *_mask_arguments(tiles, by_row=True),
        rows=rows,
        keys=k.shape[1],
        scale=scale,
        **_constants(q, k, v, tiles, scale, shape),
        DIM=dim,
        ACCUMULATE=accumulate,
    )


def gradients_of_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: TileMap,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    accumulate: tuple[bool, bool],
) -> None:
    batch, keys, kv_heads, dim = k.shape
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
        *_mask_arguments(tiles, by_row=False),
        rows=q.shape[1],
        keys=keys,
        scale=scale,
        **_constants(q, k, v, tiles, scale, shape),
        DIM=dim,
        VALUE_DIM=v.shape[3],
        ACCUMULATE_DK=accumulate[0],
        ACCUMULATE_DV=accumulate[1],
    )


def _blocks(length: int, block: int, tiles: TileMap) -> int:
    """Programs along one side. Lists start tiles in an order of their own, so that a last one counts as whole."""
    return triton.cdiv(length, block) if tiles.offset is not None else triton.cdiv(length, TILE) * (TILE // block)


def _mask_arguments(tiles: TileMap, by_row: bool) -> tuple[Any, ...]:
    mask = tiles.mask
    lists = TileLists(*(mask.begin,) * 5)  # stands in where none is read
    if tiles.offset is None:
        lists = tiles.by_row if by_row else tiles.by_key
    starts = (lists.full_start, lists.full_tiles, lists.partial_start, lists.partial_tiles, lists.longest_first)
    return (*mask.bounds, *starts, int(mask.batch > 1))


def _constants(q: Tensor, k: Tensor, v: Tensor, tiles: TileMap, scale: float, shape: Shape) -> dict[str, Any]:
    return {
        "offset": 0 if tiles.offset is None else tiles.offset,
        "scale_log2": scale * math.log2(math.e),
        "GROUP": q.shape[2] // k.shape[2],
        "LISTS": tiles.offset is None,
        "PRECISION": "ieee",
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
