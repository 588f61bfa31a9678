"""The sums of dq that the Hopper kernel leaves behind, back in rows and columns; in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from farspan.kernels.triton.hopper.sums import finish_kernel
from farspan.kernels.triton.tensors import strided

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("block_m", "dim"), [(64, 128), (128, 64)])
def test_sums_become_rows(block_m: int, dim: int, accumulate: bool) -> None:
    batch, heads, rows, tiles = 2, 3, 2 * block_m + 37, 3
    dq = torch.randn(batch, heads, tiles * block_m, dim, device=DEVICE)
    # Two halves of 64 rows each: the rows of a tile in two, or its columns.
    if block_m == 128:
        halves = dq.unflatten(2, (tiles, 2, 64))
    else:
        halves = dq.unflatten(2, (tiles, 64)).unflatten(-1, (2, dim // 2)).transpose(3, 4)
    # A warp has 16 rows. Of each 8 x 8 block a thread has two neighbours in a row, and two more in the block below.
    parts = halves.unflatten(-1, (-1, 4, 2)).unflatten(4, (4, 2, 8))
    sums = parts.permute(0, 1, 2, 3, 7, 4, 6, 8, 5, 9).contiguous()
    out = torch.ones(batch, rows, heads, dim, device=DEVICE)
    columns = block_m * dim // 128
    finish_kernel[(2 * tiles, heads, batch)](
        sums, *strided(out, (0, 1, 2)), rows, 0.5, BLOCK_M=block_m, COLUMNS=columns, ACCUMULATE=accumulate
    )
    assert torch.allclose(out, 0.5 * dq.transpose(1, 2)[:, :rows] + accumulate)
