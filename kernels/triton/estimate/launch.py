"""Launching the passes; `kernels.estimate.reference` says what each takes and returns."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.kernels.estimate.probes import Probes
from farspan.kernels.estimate.settings import VerticalSlash
from farspan.kernels.estimate.units import NOTHING, PLACE_BITS, QUARTERS, STANDS_OUT, WEIGHT_BITS
from farspan.kernels.tiles import TILE
from farspan.kernels.triton.estimate.kernels import column_scores_kernel, diagonal_masses_kernel, row_weights_kernel
from farspan.kernels.triton.tensors import last_contiguous, strided

WARPS = 4


def row_weights(q: Tensor, k: Tensor, probes: Probes, scale: float) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[1], len(probes.k_blocks), probes.rows)
    exponents, sums = (q.new_empty(shape, dtype=torch.int32) for _ in range(2))
    row_weights_kernel[_grid(k, probes)](
        *_pairs(q, k, probes, scale), exponents, sums, NONE=NOTHING, UNIT=2.0**WEIGHT_BITS, **_constants(q, k, probes)
    )
    return exponents, sums


def column_scores(
    q: Tensor, k: Tensor, probes: Probes, scale: float, lse: Tensor, bits: int, settings: VerticalSlash
) -> tuple[Tensor, Tensor]:
    ranked = q.new_empty(*q.shape[:2], probes.keys, dtype=torch.int64)
    totals = q.new_empty(*q.shape[:2], len(probes.k_blocks), 3, dtype=torch.int64)
    column_scores_kernel[_grid(k, probes)](
        *_pairs(q, k, probes, scale),
        lse.contiguous(),
        2.0**bits,
        settings.local_blocks,
        settings.sinks,
        ranked,
        totals,
        QUARTERS=QUARTERS,
        STANDS_OUT=STANDS_OUT,
        PLACE_BITS=PLACE_BITS,
        **_constants(q, k, probes),
    )
    return ranked, totals.sum(2)


def diagonal_masses(
    q: Tensor, k: Tensor, probes: Probes, scale: float, lse: Tensor, bits: int, settings: VerticalSlash, chosen: Tensor
) -> Tensor:
    left = q.new_empty(*q.shape[:2], probes.sets, 2, len(probes.k_blocks), dtype=torch.int64)
    diagonal_masses_kernel[_grid(k, probes)](
        *_pairs(q, k, probes, scale),
        lse.contiguous(),
        2.0**bits,
        settings.local_blocks,
        settings.sinks,
        chosen.contiguous().view(torch.uint8),
        probes.first_block,
        left,
        **_constants(q, k, probes),
    )
    return left


def _grid(k: Tensor, probes: Probes) -> tuple[int, int, int]:
    return k.shape[2], len(probes.k_blocks), k.shape[0]


def _pairs(q: Tensor, k: Tensor, probes: Probes, scale: float) -> tuple[Any, ...]:
    shared = int(probes.visible.batch > 1)
    rows = (*probes.visible.bounds, probes.blocks, probes.k_blocks, shared)
    return (q.contiguous(), *strided(last_contiguous(k), (0, 1, 2)), *rows, probes.keys, probes.sets, _log2(scale))


def _log2(scale: float) -> float:
    return scale * math.log2(math.e)


def _constants(q: Tensor, k: Tensor, probes: Probes) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[2],
        "DIM": q.shape[3],
        "PADDED_DIM": max(16, triton.next_power_of_2(q.shape[3])),
        "SIZE": probes.size,
        "TILE": TILE,
        "num_warps": WARPS,
    }
