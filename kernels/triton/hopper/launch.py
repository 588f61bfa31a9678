"""Launching the Hopper kernels: descriptors, register shares, grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from farspan.kernels.tiles import TILE, TileMap
from farspan.kernels.triton.hopper.forward import forward_kernel

# Keys and values that heads in flight may share of the L2 cache: half of it on an H200.
_L2_BYTES = 24 << 20


@dataclass(frozen=True)
class ForwardShape:
    """Consumer warpgroups, rows of each, keys of a tile, tiles in flight, and the registers of a thread by role."""

    consumers: int
    rows: int
    keys: int
    stages: int
    consumer_registers: int
    producer_registers: int

    @property
    def registers(self) -> int:
        """What a thread starts with: roles only move registers from one warpgroup to another."""
        total = self.producer_registers + self.consumers * self.consumer_registers
        return min(total, 512) // (self.consumers + 1) // 8 * 8


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels compute such tensors; the portable ones compute the rest."""
    return (
        q.device.type == "cuda"
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3]
        and q.shape[3] in (64, 128)
    )


def forward_shape(dim: int, lists: bool) -> ForwardShape:
    """Measured on one H200; lists are of 128 x 128 tiles."""
    if dim == 64 and not lists:
        return ForwardShape(3, 64, 64, 4, 160, 32)
    return ForwardShape(2, 64, TILE, 3 if dim == 64 else 2, 240, 24)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileMap, scale: float, out: Tensor, lse: Tensor, accumulate: bool
) -> None:
    """Writes out and lse, or merges into them; shapes as in `attend`, the last dims of all tensors contiguous."""
    batch, rows, heads, dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    lists = tiles.by_row if tiles.offset is None else None
    shape = forward_shape(dim, lists is not None)
    row_tiles = -(-rows // (shape.consumers * shape.rows))
    programs = batch * heads * row_tiles
    if lists is None:
        # Programs that stay walk over row tiles; lists are of any length, there the hardware balances better.
        programs = min(programs, torch.cuda.get_device_properties(q.device).multi_processor_count)
    mask_arguments: tuple[Any, ...] = (None,) * 9
    if lists is not None:
        starts = (lists.full_start, lists.full_tiles, lists.partial_start, lists.partial_tiles, lists.longest_first)
        mask_arguments = (*tiles.mask.bounds, *starts)
    forward_kernel[(programs,)](
        _descriptor(q, shape.rows),
        _descriptor(k, shape.keys),
        _descriptor(v, shape.keys),
        out,
        *out.stride()[:3],
        lse,
        *lse.stride()[:2],
        *mask_arguments,
        mask_stride=int(tiles.mask.batch > 1),
        rows=rows,
        keys=keys,
        offset=0 if tiles.offset is None else tiles.offset,
        heads=heads,
        group=group,
        batch_heads=batch * heads,
        row_tiles=row_tiles,
        section=min(batch * heads, group * max(1, _L2_BYTES // (2 * keys * dim * q.itemsize))),
        scale_log2=scale * math.log2(math.e),
        LISTS=lists is not None,
        ACCUMULATE=accumulate,
        CONSUMERS=shape.consumers,
        STAGES=shape.stages,
        PRODUCER_REGISTERS=shape.producer_registers,
        CONSUMER_REGISTERS=shape.consumer_registers,
        num_warps=4,
        maxnreg=shape.registers,
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of `rows` tokens of one head of `[B, S, H, D]`; past the ends they hold zeros."""
    box = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    # The strides of dims of size 1 mean nothing, but the hardware checks them.
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride()[:3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box, layout)
