"""Launching the Hopper kernels: descriptors, grids, and which of them compute a call."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from farspan.kernels.tiles import TILE, TileLists
from farspan.kernels.triton.hopper.dkdv import dkdv_kernel
from farspan.kernels.triton.hopper.dq import dq_kernel
from farspan.kernels.triton.hopper.forward import forward_kernel
from farspan.kernels.triton.hopper.one_pass import one_pass_kernel
from farspan.kernels.triton.hopper.shapes import dkdv_shape, dq_stages, forward_shape, one_pass_shape
from farspan.kernels.triton.hopper.statistics import statistics_kernel
from farspan.kernels.triton.hopper.sums import finish_kernel
from farspan.kernels.triton.selected import SelectedTiles, Tiles
from farspan.kernels.triton.tensors import rows_in_steps_of_16_bytes, strided

# Keys and values that heads in flight may share of the L2 cache: half of it on an H200.
_L2_BYTES = 24 << 20
# Rows and keys that one launch of the one-pass kernel takes of a full rectangle: what it visits again and again then
# stays in the cache. Measured at 32 heads over 8: 465 TFLOP/s of 32768 rows and 65536 keys at once, 513 in such parts.
_MOST_ROWS, _MOST_KEYS = 32768, 16384


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels compute such tensors; the portable ones compute the rest."""
    return (
        q.device.type == "cuda"
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3]
        and q.shape[3] in (64, 128)
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    scale: float,
    out: Tensor,
    lse: Tensor,
    base: tuple[Tensor, Tensor] | None,
) -> None:
    """Writes out `[B, S, H, D]` and lse `[B, H, S]` of tiles, merged with `base`: they themselves, or alike in fp32."""
    q, k, v = (rows_in_steps_of_16_bytes(x) for x in (q, k, v))
    batch, rows, heads, dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    lists = tiles.by_row if tiles.offset is None else None
    shape = forward_shape(dim, lists is not None)
    row_tiles = -(-rows // (shape.consumers * shape.rows))
    programs = batch * heads * row_tiles
    if lists is None:
        # Programs that stay walk over row tiles; lists are of any length, there the hardware balances better. Four for
        # each multiprocessor, one after another: where a transfer holds some, the others take what these would have.
        programs = min(programs, 4 * torch.cuda.get_device_properties(q.device).multi_processor_count)
    forward_kernel[(programs,)](
        _descriptor(q, shape.rows),
        _descriptor(k, shape.keys),
        _descriptor(v, shape.keys),
        *strided(out, (0, 1, 2)),
        *strided(lse, (0, 1)),
        *(base or (out, lse)),
        *_mask_arguments(tiles, lists),
        rows=rows,
        keys=keys,
        offset=0 if tiles.offset is None else tiles.offset,
        heads=heads,
        group=group,
        batch_heads=batch * heads,
        row_tiles=row_tiles,
        section=min(batch * heads, group * max(1, _L2_BYTES // (2 * keys * dim * q.itemsize))),
        scale=scale,
        LISTS=lists is not None,
        ACCUMULATE=base is not None,
        CONSUMERS=shape.consumers,
        STAGES=shape.stages,
        PRODUCER_REGISTERS=shape.producer_registers,
        CONSUMER_REGISTERS=shape.consumer_registers,
        num_warps=4,
        maxnreg=shape.registers,
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
    bases: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Writes dq, dk and dv of tiles, plus their bases: they themselves or, except under a dense mask, alike in fp32."""
    dout, q, k, v = (rows_in_steps_of_16_bytes(x) for x in (dout, q, k, v))
    if tiles.offset is not None:
        adds = (bases[0] is not None, bases[1] is not None, bases[2] is not None)
        _one_pass(dout, q, k, v, lse, delta, tiles.offset, scale, gradients, adds)
    else:
        statistics = _statistics(lse, delta)
        _gradient_of_queries(dout, q, k, v, statistics, tiles, scale, gradients[0], bases[0])
        _gradients_of_keys(dout, q, k, v, statistics, tiles, scale, gradients[1:], bases[1:])


def _statistics(lse: Tensor, delta: Tensor) -> Tensor:
    """lse to base 2 and delta, padded to whole tiles: `[2, B, H, padded S]`."""
    batch, heads, rows = lse.shape
    padded = -(-rows // TILE) * TILE
    packed = lse.new_empty(2, batch, heads, padded)
    statistics_kernel[(triton.cdiv(padded, 1024), heads, batch)](
        *strided(lse, (0, 1)), *strided(delta, (0, 1)), packed[0], packed[1], rows, padded, BLOCK=1024
    )
    return packed


def _one_pass(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    offset: int,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
    accumulate: tuple[bool, bool, bool],
) -> None:
    """All pairs at once, but for those of full rectangles in parts."""
    rows, keys = q.shape[1], k.shape[1]
    if offset < keys:
        _one_pass_of_rows(dout, q, k, v, lse, delta, offset, scale, gradients, accumulate, keys)
        return
    dq, dk, dv = gradients
    # dk and dv of several parts of the rows are sums of their own: they must not be rounded in between.
    at_once = _MOST_ROWS if dk.dtype == dv.dtype == torch.float32 else rows
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        of_rows = (dout[:, part], q[:, part], k, v, lse[..., part], delta[..., part], offset, scale)
        adds = accumulate if first == 0 else (accumulate[0], True, True)
        _one_pass_of_rows(*of_rows, (dq[:, part], dk, dv), adds, _MOST_KEYS)


def _one_pass_of_rows(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    offset: int,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
    accumulate: tuple[bool, bool, bool],
    keys_at_once: int,
) -> None:
    batch, rows, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    shape = one_pass_shape(dim, causal=offset < keys)
    statistics = _statistics(lse, delta)
    row_tiles = -(-rows // shape.rows)
    sums = q.new_zeros(batch * heads * row_tiles * shape.rows * dim, dtype=torch.float32)
    dq, dk, dv = gradients
    for first in range(0, keys, keys_at_once):
        part = slice(first, min(first + keys_at_once, keys))
        here = part.stop - part.start
        one_pass_kernel[(-(-here // TILE), kv_heads, batch)](
            _descriptor(q, shape.rows),
            _descriptor(k[:, part], 64),
            _descriptor(v[:, part], 64),
            _descriptor(dout, shape.rows),
            _flat_descriptor(statistics[0], shape.rows),
            _flat_descriptor(statistics[1], shape.rows),
            sums,
            q.new_zeros(1 + batch * heads * row_tiles, dtype=torch.int32),
            *strided(dk[:, part], (0, 1, 2)),
            *strided(dv[:, part], (0, 1, 2)),
            rows=rows,
            keys=here,
            padded_rows=statistics.shape[-1],
            offset=offset,
            scale=scale,
            GROUP=heads // kv_heads,
            ACCUMULATE_DK=accumulate[1],
            ACCUMULATE_DV=accumulate[2],
            STAGES=shape.stages,
            DS_STAGES=shape.ds_stages,
            LAG=shape.lag,
            num_warps=4,
        )
    finish_kernel[(2 * row_tiles, heads, batch)](
        sums,
        *strided(dq, (0, 1, 2)),
        rows,
        scale,
        BLOCK_M=shape.rows,
        COLUMNS=shape.rows * dim // 128,
        ACCUMULATE=accumulate[0],
    )


def _gradient_of_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    tiles: Tiles,
    scale: float,
    dq: Tensor,
    base: Tensor | None,
) -> None:
    batch, rows, heads, dim = q.shape
    dq_kernel[(-(-rows // TILE), heads, batch)](
        _descriptor(q, 64),
        _descriptor(k, TILE),
        _descriptor(v, TILE),
        _descriptor(dout, 64),
        statistics[0],
        statistics[1],
        *strided(dq, (0, 1, 2)),
        dq if base is None else base,
        *_mask_arguments(tiles, tiles.by_row),
        rows=rows,
        padded_rows=statistics.shape[-1],
        group=heads // k.shape[2],
        scale=scale,
        ACCUMULATE=base is not None,
        STAGES=dq_stages(dim),
        num_warps=4,
    )


def _gradients_of_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    tiles: Tiles,
    scale: float,
    gradients: tuple[Tensor, Tensor],
    bases: tuple[Tensor | None, Tensor | None],
) -> None:
    batch, keys, kv_heads, _ = k.shape
    rows, stages = dkdv_shape()
    dkdv_kernel[(-(-keys // TILE), kv_heads, batch)](
        _descriptor(q, rows),
        _descriptor(k, 64),
        _descriptor(v, 64),
        _descriptor(dout, rows),
        _flat_descriptor(statistics[0], rows),
        _flat_descriptor(statistics[1], rows),
        *strided(gradients[0], (0, 1, 2)),
        *strided(gradients[1], (0, 1, 2)),
        *(own if base is None else base for own, base in zip(gradients, bases, strict=True)),
        *_mask_arguments(tiles, tiles.by_key),
        rows=q.shape[1],
        keys=keys,
        padded_rows=statistics.shape[-1],
        scale=scale,
        GROUP=q.shape[2] // kv_heads,
        SPARSE=isinstance(tiles, SelectedTiles),
        ACCUMULATE_DK=bases[0] is not None,
        ACCUMULATE_DV=bases[1] is not None,
        STAGES=stages,
        num_warps=4,
    )


def _mask_arguments(tiles: Tiles, lists: TileLists | None) -> tuple[Any, ...]:
    """The mask's bounds, the lists of one side, and the steps from one batch element to the next and between heads."""
    if lists is None:
        return (None,) * 9 + (0, 0, 0)
    starts = (lists.full_start, lists.full_tiles, lists.partial_start, lists.partial_tiles, lists.longest_first)
    return (*tiles.mask.bounds, *starts, int(tiles.mask.batch > 1), *lists.strides)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of `rows` tokens of one head of `[B, S, H, D]`; past the ends they hold zeros."""
    box = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    # The strides of dims of size 1 mean nothing, but the hardware checks them.
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride()[:3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box, layout)


def _flat_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x.numel()], [1], [rows], gl.NVMMASharedLayout(0, 32, rank=1))
