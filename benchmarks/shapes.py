"""Times block shapes of the portable Triton kernels: what `kernels/triton/portable/shapes.py` was chosen by.

    python benchmarks/shapes.py --dims 128 64 --lengths 32768

All candidates are compiled first, in parallel; a candidate that does not compile or run is reported as such.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from triton.testing import do_bench

from farspan.kernels import masks
from farspan.kernels.tiles import TileMap
from farspan.kernels.triton.portable import launch
from farspan.kernels.triton.portable.shapes import Shape

FORWARD = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3)]
DQ = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2)]
DKDV = [
    (64, 64, 4, 2),
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (32, 128, 8, 3),
    (128, 64, 8, 2),
    (64, 64, 4, 3),
    (128, 128, 8, 2),
]
KERNELS = {"forward": FORWARD, "dq": DQ, "dkdv": DKDV}


def run(
    kernel: str, shape: Shape, dim: int, length: int, causal: bool, heads: int, kv_heads: int
) -> Callable[[], object]:
    """A function that runs one kernel with a shape."""
    q, dout = (torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, length, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = (masks.causal if causal else masks.full)(length).to("cuda")
    tiles, scale = TileMap.of(mask, length), dim**-0.5
    lse = torch.full((1, heads, length), math.log(length), device="cuda")
    setattr(launch, f"{kernel}_shape", lambda dim, itemsize: shape)
    if kernel == "forward":
        return lambda: launch.forward(q, k, v, tiles, scale, dout, lse, False)
    common = (dout, q, k, v, lse, torch.zeros_like(lse), tiles, scale)
    if kernel == "dq":
        return lambda: launch.gradient_of_queries(*common, torch.empty_like(q), False)
    return lambda: launch.gradients_of_keys(*common, torch.empty_like(k), torch.empty_like(v), (False, False))


def candidates(dims: list[int]) -> Iterator[tuple[str, int, Shape]]:
    for dim in dims:
        for kernel, shapes in KERNELS.items():
            yield from ((kernel, dim, Shape(*shape)) for shape in shapes)


def compile_in_child(candidate: tuple[str, int, Shape]) -> str | None:
    """Fills Triton's cache on disk; the last line of the error if that fails."""
    command = [sys.executable, __file__, "--compile", json.dumps(candidate)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["killed"])[-1][:100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        kernel, dim, shape = json.loads(arguments.compile)
        for causal in (True, False):
            run(kernel, Shape(*shape), dim, 512, causal, 8, 2)()
        torch.cuda.synchronize()
        return
    todo = list(candidates(arguments.dims))
    with ThreadPoolExecutor(arguments.workers) as pool:
        errors = list(pool.map(compile_in_child, todo))
    for length in arguments.lengths:
        for (kernel, dim, shape), error in zip(todo, errors, strict=True):
            if error:
                print(f"{kernel:8} {dim:4} {tuple(shape)!s:20} {error}", flush=True)
                continue
            cells = []
            for causal in (True, False):
                pairs = length * (length + 1) // 2 if causal else length * length
                products = {"forward": 4, "dq": 6, "dkdv": 8}[kernel]
                ms = do_bench(
                    run(kernel, shape, dim, length, causal, arguments.heads, arguments.kv_heads),
                    5,
                    40,
                    return_mode="median",
                )
                rate = products * dim * arguments.heads * pairs / ms / 1e9
                cells.append(f"{'causal' if causal else 'full'} {ms:8.3f} ms {rate:6.1f} TFLOP/s run")
            print(f"{kernel:8} {dim:4} {length:7} {tuple(shape)!s:20} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
