"""Sums and products that have the same bits wherever they are computed, and beside whatever else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def fixed_sum(x: Tensor) -> Tensor:
    """Over the last dim: neighbours are added in pairs, the pairs in pairs, and so on; zeros at the end change nothing.

    The grouping is written down here and not left to a reduction, which may choose another one for another shape.
    """
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = functional.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def products(rows: Tensor, keys: Tensor) -> Tensor:
    """fp32 `[n, rows, keys]` of `[n, rows, K]` and `[keys, K]`: n products of one shape, each of which stands alone.

    A product's bits depend on the shape, so those who are to find the same give the same n, rows, keys and K.
    """
    shared = keys.T.expand(len(rows), -1, -1)
    if rows.device.type == "cuda" and rows.itemsize == keys.itemsize == 2:
        return torch.bmm(rows, shared, out_dtype=torch.float32)
    return torch.bmm(rows.float(), shared.float())
