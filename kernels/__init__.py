"""Attention on one device: masks, kernels and their merging. Nothing here knows of ranks."""

from farspan.kernels import masks
from farspan.kernels.attend import attend, attend_backward, row_delta
from farspan.kernels.backends import BACKENDS
from farspan.kernels.masks import IntervalMask
from farspan.kernels.merge import accumulation_dtype, merge, merge_into
from farspan.kernels.transfer import to_device

__all__ = [
    "BACKENDS",
    "IntervalMask",
    "accumulation_dtype",
    "attend",
    "attend_backward",
    "masks",
    "merge",
    "merge_into",
    "row_delta",
    "to_device",
]
