"""Times block shapes of the portable Triton kernels: what `kernels/triton/portable/shapes.py` was chosen by.

    python benchmarks/shapes.py --dims 128 64 --lengths 32768

All candidates are compiled first, in parallel; a candidate that does not compile or run is reported as such. Under a
sparse index the times include that of listing its tiles, which stands alone as `lists`, and of dkdv that of the kernel
for columns, which stands alone as `column`; rates count the pairs of tiles and of columns.
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
from farspan.kernels.index import Places, VerticalSlashIndex
from farspan.kernels.tiles import TILE, TileMap
from farspan.kernels.triton.portable import launch, shapes
from farspan.kernels.triton.portable.shapes import Shape
from farspan.kernels.triton.selected import SelectedTiles

FORWARD = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3)]
DQ = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2)]
DKDV = [
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (32, 128, 8, 3),
    (128, 64, 8, 2),
    (64, 64, 4, 3),
    (128, 128, 8, 2),
]
COLUMN = [(32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2)]
LISTS = [(0, 0, 0, 0)]  # has no shape
KERNELS = {"forward": FORWARD, "dq": DQ, "dkdv": DKDV, "column": COLUMN, "lists": LISTS}
PRODUCTS = {"forward": 4, "dq": 6, "dkdv": 8, "column": 8, "lists": 0}
# Of a sparse index: the share of diagonals of blocks, and columns of a head.
DENSITY, COLUMNS = 0.05, 2048


def sparse_index(length: int, heads: int) -> VerticalSlashIndex:
    """Diagonals and columns at random, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    diagonals = torch.rand(1, heads, -(-length // TILE), generator=generator) < DENSITY
    diagonals[..., 0] = True
    columns = torch.rand(1, heads, length, generator=generator).topk(min(COLUMNS, length)).indices
    return VerticalSlashIndex(diagonals.cuda(), columns.sort(-1).values.int().cuda(), length)


def pairs_of(case: str, length: int, heads: int) -> tuple[float, float]:
    """(row, key) pairs of all heads that tiles compute, and that columns do."""
    if case != "sparse":
        return heads * (length * (length + 1) / 2 if case == "causal" else length * length), 0.0
    index = sparse_index(length, heads)
    tiles = float(index.density().sum()) * length * (length + 1) / 2
    return tiles, float((length - index.columns).sum())


def cases_of(kernel: str) -> tuple[str, ...]:
    return ("sparse",) if kernel in ("column", "lists") else ("causal", "full", "sparse")


def run(kernel: str, shape: Shape, dim: int, length: int, case: str, heads: int, kv_heads: int) -> Callable[[], object]:
    """A function that runs one kernel with a shape."""
    q, dout = (torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, length, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = (masks.full if case == "full" else masks.causal)(length).to("cuda")
    scale = dim**-0.5
    tiles: launch.Tiles = TileMap.of(mask, length)
    if case == "sparse":
        places = Places.of(range(length), range(length), device="cuda")
        tiles = SelectedTiles(TileMap.of(mask, length), sparse_index(length, heads).at(places), kv_heads)
    if kernel == "lists":
        return lambda: (tiles.by_row, tiles.by_key)
    lse = torch.full((1, heads, length), math.log(length), device="cuda")
    for name in ("forward_shape", "dq_shape", "dkdv_shape", "column_shape"):
        setattr(launch, name, getattr(shapes, name))
    setattr(launch, f"{kernel}_shape", lambda dim, itemsize: shape)
    if kernel == "forward":
        return lambda: launch.forward(q, k, v, tiles, scale, dout, lse, False)
    common = (dout, q, k, v, lse, torch.zeros_like(lse), tiles, scale)
    if kernel == "dq":
        return lambda: launch.gradient_of_queries(*common, torch.empty_like(q), False)
    if kernel == "column":
        return lambda: launch.gradients_of_columns(*common)
    return lambda: launch.gradients_of_keys(*common, torch.empty_like(k), torch.empty_like(v), (False, False))


def candidates(dims: list[int]) -> Iterator[tuple[str, int, Shape]]:
    for dim in dims:
        for kernel, tried in KERNELS.items():
            yield from ((kernel, dim, Shape(*shape)) for shape in tried)


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
        for case in cases_of(kernel):
            run(kernel, Shape(*shape), dim, 512, case, 8, 2)()
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
            for case in cases_of(kernel):
                of_tiles, of_columns = pairs_of(case, length, arguments.heads)
                pairs = of_columns if kernel == "column" else of_tiles + of_columns
                ms = do_bench(
                    run(kernel, shape, dim, length, case, arguments.heads, arguments.kv_heads),
                    5,
                    40,
                    return_mode="median",
                )
                rate = PRODUCTS[kernel] * dim * pairs / ms / 1e9
                cells.append(f"{case} {ms:8.3f} ms {rate:6.1f} TFLOP/s run")
            print(f"{kernel:8} {dim:4} {length:7} {tuple(shape)!s:20} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
