"""What estimating a vertical-slash index costs on one GPU: each pass by warps of its programs, choosing, and the whole.

    python benchmarks/estimate.py --lengths 32768 131072 524288 1048576

Heads are those of Qwen2.5-3B. An index may cost 6 % of the sparse forward pass: at 524,288 tokens and 5 % of the tiles,
and 500 TFLOP/s, that is 6.8 ms.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from farspan.kernels import masks
from farspan.kernels.estimate import VerticalSlash
from farspan.kernels.estimate.units import mass_bits
from farspan.kernels.triton.estimate import launch
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

WARPS = (4, 8)


def milliseconds(run: Callable[[], object]) -> float:
    return float(do_bench(run, 10, 60, return_mode="median"))


def cases(length: int, heads: int, kv_heads: int, segments: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    q = torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, length, kv_heads, 128, device="cuda", dtype=torch.bfloat16)
    settings = VerticalSlash(segments=segments)
    estimator = Estimator(orders.contiguous(length, 1), masks.causal(length), settings, 0, None, "cuda")
    probes = estimator.method.probes
    bits = mass_bits(probes.rows)
    rows: Tensor = q[:, -probes.rows :].transpose(1, 2).contiguous()
    given = (rows, k, probes, 128**-0.5)
    lse = torch.full(rows.shape[:3], 30.0, device="cuda")
    chosen = torch.zeros(1, heads, length, dtype=torch.bool, device="cuda")
    return {
        "row weights": lambda: launch.row_weights(*given),
        "column scores": lambda: launch.column_scores(*given, lse, bits, settings),
        "diagonal masses": lambda: launch.diagonal_masses(*given, lse, bits, settings, chosen),
        "whole": lambda: estimator(q, k),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 524288])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--segments", type=int, default=1)
    arguments = parser.parse_args()
    for length in arguments.lengths:
        timed = cases(length, arguments.heads, arguments.kv_heads, arguments.segments)
        for warps in WARPS:
            launch.WARPS = warps
            cells = [f"{name} {milliseconds(run):7.3f} ms" for name, run in timed.items()]
            print(f"{length:9,} tokens  {warps} warps  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
