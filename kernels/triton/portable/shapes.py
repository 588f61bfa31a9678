"""Block shapes of the Triton kernels, measured on one H200 (`benchmarks/shapes.py`)."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Rows and keys of a block, warps of a program, and depth of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def forward_shape(dim: int, itemsize: int) -> Shape:
    """For a padded head dim and the bytes of an element."""
    if itemsize == 4:
        return Shape(64, 32, 4, 2) if dim <= 128 else Shape(32, 32, 4, 1)
    return Shape(128, 64, 8, 3) if dim <= 128 else Shape(128, 64, 8, 2)


def dq_shape(dim: int, itemsize: int) -> Shape:
    if itemsize == 4:
        return Shape(64, 32, 4, 1) if dim <= 128 else Shape(32, 32, 4, 1)
    return Shape(128, 64, 8, 3) if dim <= 128 else Shape(64, 32, 8, 2)


def dkdv_shape(dim: int, itemsize: int) -> Shape:
    if itemsize == 4:
        return Shape(32, 64, 4, 1) if dim <= 128 else Shape(32, 32, 4, 1)
    return Shape(64, 64, 4, 2) if dim <= 128 else Shape(32, 64, 8, 2)


def column_shape(dim: int, itemsize: int) -> Shape:
    """Rows, and columns of a group. Not measured: of the shapes that spill nothing, one that leaves room for two."""
    return Shape(32, 64, 4, 3) if itemsize < 4 and dim <= 128 else dkdv_shape(dim, itemsize)
