"""The Triton backend: from tensors and a mask to kernel launches."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from farspan.kernels.backends.base import Accumulated
from farspan.kernels.masks import IntervalMask
from farspan.kernels.problem import Problem
from farspan.kernels.tiles import TILE, TileLists, TileMap
from farspan.kernels.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from farspan.kernels.triton.forward import forward_kernel
from farspan.kernels.triton.hopper import launch as hopper
from farspan.kernels.triton.shapes import Shape, dkdv_shape, dq_shape, forward_shape

any_mask = True

_INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(problem: Problem) -> str | None:
    """Why such tensors cannot go through the kernels, or None if they can."""
    if problem.capability is None and not _INTERPRETED:
        return "triton needs a GPU"
    if problem.dtype not in DTYPES:
        return f"triton takes bf16, fp16 and fp32, got {problem.dtype}"
    if _INTERPRETED and problem.dtype == torch.bfloat16:
        return "triton computes bf16 wrongly where TRITON_INTERPRET is set"
    dims = problem.head_dim, problem.value_dim
    if max(dims) > 256 or any(dim * problem.dtype.itemsize % 16 for dim in dims):
        return f"triton takes head dims up to 256 whose rows are multiples of 16 bytes, got {dims[0]} and {dims[1]}"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    out_dtype: torch.dtype,
    accumulate: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, dim = q.shape
    keys, value_dim = k.shape[1], v.shape[3]
    tiles = TileMap.of(mask, keys)
    if accumulate is None:
        out = q.new_empty(batch, rows, heads, value_dim, dtype=out_dtype)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        out, lse = accumulate
    if hopper.takes(q, v):
        q, k, v = (_inner_contiguous(x) for x in (q, k, v))
        hopper.forward(q, k, v, tiles, scale, out, lse, accumulate is not None)
        return out, lse
    shape = forward_shape(_padded(max(dim, value_dim)), q.itemsize)
    forward_kernel[(_blocks(rows, shape.block_m, tiles), heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        *_strided(out, (0, 2, 1)),
        *_strided(lse, (0, 1)),
        *_mask_arguments(tiles, by_row=True),
        **_sizes(rows, keys, scale),
        **_constants(q, k, v, tiles, shape),
        VALUE_DIM=value_dim,
        ACCUMULATE=accumulate is not None,
    )
    return out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    mask: IntervalMask,
    scale: float,
    out_dtype: torch.dtype,
    accumulate: Accumulated,
) -> tuple[Tensor, Tensor, Tensor]:
    if hopper.takes(q, v):
        return _on_hopper(dout, q, k, v, lse, delta, mask, scale, out_dtype, accumulate)
    common = (dout, q, k, v, lse, delta, mask, scale, out_dtype)
    return gradient_of_queries(*common, accumulate[0]), *gradients_of_keys(*common, accumulate[1], accumulate[2])


def _on_hopper(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: IntervalMask,
    scale: float,
    out_dtype: torch.dtype,
    accumulate: Accumulated,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = TileMap.of(mask, k.shape[1])
    dq, dk, dv = (_gradient(x, out_dtype, total) for x, total in zip((q, k, v), accumulate, strict=True))
    dout, q, k, v = (_inner_contiguous(x) for x in (dout, q, k, v))
    packed = hopper.statistics(_last_contiguous(lse), _last_contiguous(delta))
    hopper.gradient_of_queries(dout, q, k, v, packed, tiles, scale, dq, accumulate[0] is not None)
    adds = accumulate[1] is not None, accumulate[2] is not None
    hopper.gradients_of_keys(dout, q, k, v, packed, tiles, scale, dk, dv, adds)
    return dq, dk, dv


def gradient_of_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: IntervalMask,
    scale: float,
    out_dtype: torch.dtype,
    accumulate: Tensor | None,
) -> Tensor:
    """dq alone."""
    batch, rows, heads, dim = q.shape
    tiles = TileMap.of(mask, k.shape[1])
    dq = _gradient(q, out_dtype, accumulate)
    shape = dq_shape(_padded(max(dim, v.shape[3])), q.itemsize)
    dq_kernel[(_blocks(rows, shape.block_m, tiles), heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        _descriptor(dout, shape.block_m),
        *_strided(_last_contiguous(lse), (0, 1)),
        *_strided(_last_contiguous(delta), (0, 1)),
        *_strided(dq, (0, 2, 1)),
        *_mask_arguments(tiles, by_row=True),
        **_sizes(rows, k.shape[1], scale),
        **_constants(q, k, v, tiles, shape),
        scale=scale,
        DIM=dim,
        ACCUMULATE=accumulate is not None,
    )
    return dq


def gradients_of_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: IntervalMask,
    scale: float,
    out_dtype: torch.dtype,
    accumulate_dk: Tensor | None,
    accumulate_dv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    batch, keys, kv_heads, dim = k.shape
    tiles = TileMap.of(mask, keys)
    dk, dv = _gradient(k, out_dtype, accumulate_dk), _gradient(v, out_dtype, accumulate_dv)
    shape = dkdv_shape(_padded(max(dim, v.shape[3])), q.itemsize)
    dkdv_kernel[(_blocks(keys, shape.block_n, tiles), kv_heads, batch)](
        _descriptor(q, shape.block_m),
        _descriptor(k, shape.block_n),
        _descriptor(v, shape.block_n),
        _descriptor(dout, shape.block_m),
        *_strided(_last_contiguous(lse), (0, 1)),
        *_strided(_last_contiguous(delta), (0, 1)),
        *_strided(dk, (0, 2, 1)),
        *_strided(dv, (0, 2, 1)),
        *_mask_arguments(tiles, by_row=False),
        **_sizes(q.shape[1], keys, scale),
        **_constants(q, k, v, tiles, shape),
        scale=scale,
        DIM=dim,
        VALUE_DIM=v.shape[3],
        ACCUMULATE_DK=accumulate_dk is not None,
        ACCUMULATE_DV=accumulate_dv is not None,
    )
    return dk, dv


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """`rowsum(dout * out)` fp32 `[B, H, S]`, each input read once."""
    batch, rows, heads, dim = out.shape
    delta = out.new_empty(batch, heads, rows, dtype=torch.float32)
    block = 64
    dout, out = _inner_contiguous(dout), _inner_contiguous(out)
    delta_kernel[(triton.cdiv(rows, block), heads, batch)](
        dout, *dout.stride()[:3], out, *out.stride()[:3], delta, rows, DIM=dim, PADDED_DIM=_padded(dim), BLOCK=block
    )
    return delta


def _blocks(length: int, block: int, tiles: TileMap) -> int:
    """Programs along one side. Lists start tiles in an order of their own, so that a last one counts as whole."""
    return triton.cdiv(length, block) if tiles.offset is not None else triton.cdiv(length, TILE) * (TILE // block)


def _gradient(x: Tensor, dtype: torch.dtype, accumulate: Tensor | None) -> Tensor:
    if accumulate is not None:
        return accumulate
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _mask_arguments(tiles: TileMap, by_row: bool) -> tuple[Any, ...]:
    mask = tiles.mask
    lists = TileLists(*(mask.begin,) * 5)  # stands in where none is read
    if tiles.offset is None:
        lists = tiles.by_row if by_row else tiles.by_key
    return (
        *mask.bounds,
        lists.full_start,
        lists.full_tiles,
        lists.partial_start,
        lists.partial_tiles,
        lists.longest_first,
        int(mask.batch > 1),
    )


def _sizes(rows: int, keys: int, scale: float) -> dict[str, Any]:
    return {"rows": rows, "keys": keys, "scale_log2": scale * math.log2(math.e)}


def _constants(q: Tensor, k: Tensor, v: Tensor, tiles: TileMap, shape: Shape) -> dict[str, Any]:
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "offset": 0 if tiles.offset is None else tiles.offset,
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


def _last_contiguous(x: Tensor) -> Tensor:
    # A dim of size 1 counts as contiguous whatever its stride; `clone` makes it 1.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _strided(x: Tensor, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """A tensor, and the strides of some of its dims; the last must be 1, and what is written can't be a copy."""
    if x.stride(-1) != 1:
        raise ValueError(f"what attention accumulates into must be contiguous in its last dim, got {x.stride()}")
    return (x, *(x.stride(dim) for dim in dims))


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """`[B, S, H, D]` as `[B, H, S, D]`, loaded `block` rows at a time; past the ends it reads zeros."""
    x = _inner_contiguous(x).transpose(1, 2)
    # The strides of dims of size 1 mean nothing, but the hardware checks them.
    strides = [stride if size > 1 else x.shape[3] * 8 for size, stride in zip(x.shape[:3], x.stride()[:3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, _padded(x.shape[3])])


def _inner_contiguous(x: Tensor) -> Tensor:
    """x itself, or a copy where its rows do not lie as the hardware's tensor loads need them: 16-byte steps."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3]) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step * x.itemsize % 16 == 0 for step in steps)
    return x if x.stride(3) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
