"""How fast is each attention backend on this GPU? Writes the table that `attention.backend: auto` chooses by.

    python benchmarks/rates.py

Takes about two minutes on an H200. It updates `kernels/rates.json` (or writes --output): the table of this GPU's
compute capability is measured anew, figures of backends that are not installed and tables of other GPUs stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.testing import do_bench

from farspan.kernels import IntervalMask, attend, attend_backward, masks, row_delta
from farspan.kernels.backends import REGISTRY
from farspan.kernels.problem import Problem
from farspan.kernels.rates import Kind

HEADS, KV_HEADS = 32, 8
BACKENDS = tuple(name for name in REGISTRY if name != "reference")
KINDS: tuple[Kind, ...] = ("causal", "full", "lists")
DIRECTIONS = ("forward", "backward")
SQUARES = dict.fromkeys((64, 128), (512, 1024, 2048, 4096, 8192, 16384, 32768)) | {256: (2048, 8192)}
DOCUMENTS = dict.fromkeys((64, 128), (64, 128, 256, 512, 1024, 2048, 4096)) | {256: (256, 1024)}
# A row that is measured as lists: so many documents that the GPU is busy, however short they are.
LIST_ROWS = 1 << 16
# Backends take turns, so that all meet the same clocks; of the rounds the best counts.
ROUNDS = 2


class Key(NamedTuple):
    kind: Kind
    dim: int
    backend: str


@dataclass(frozen=True)
class Case:
    """One problem, and the backends that take it. `length` is that of a square, or of each document of lists."""

    kind: Kind
    dim: int
    length: int

    @property
    def rows(self) -> int:
        return LIST_ROWS if self.kind == "lists" else self.length

    @property
    def backends(self) -> list[str]:
        problem = Problem(1, self.rows, HEADS, KV_HEADS, self.dim, self.dim, torch.bfloat16, capability())
        able = [name for name in BACKENDS if REGISTRY[name].refusal(problem) is None]
        return [name for name in able if self.kind != "lists" or REGISTRY[name].any_mask]

    def mask(self) -> IntervalMask:
        if self.kind == "full":
            return masks.full(self.length).to("cuda")
        return masks.causal(self.rows, range(0, self.rows + 1, self.length)).to("cuda")

    def runs(self, backend: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
        """One forward pass, one backward pass, and the visible pairs."""
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = [(1, self.rows, heads, self.dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        q, k, v, dout = (
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes
        )
        mask = self.mask()
        out, lse = attend(q, k, v, mask, backend=backend)
        delta = row_delta(dout, out)
        return (
            lambda: attend(q, k, v, mask, backend=backend),
            lambda: attend_backward(dout, q, k, v, out, lse, mask, delta=delta, backend=backend),
            mask.area(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = Path(str(files("farspan.kernels").joinpath("rates.json")))
    parser.add_argument("--output", type=Path, default=table, help="where the table goes (%(default)s)")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        run_once(Key(*json.loads(options.compile)))
        return
    begin = time.perf_counter()
    usable = compile_all()
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    found = measure(usable)
    number = "sm_{}{}".format(*capability())
    tree = json.loads(table.read_text())
    before = tree.get(number, {"tflops": {}})["tflops"]
    tree[number] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tflops": before | found,
    }
    options.output.write_text(dump(tree))
    print_table(found)
    print(f"{options.output} written after {time.perf_counter() - begin:.0f} s")


def compile_all() -> set[Key]:
    """Runs each backend once by kind and head dim, and says which could: one that fails must not end the others' run.

    In processes of their own, side by side: Triton fills its cache on disk there.
    """
    once = [Case(kind, dim, 2048) for dim in SQUARES for kind in KINDS]
    keys = [Key(case.kind, case.dim, backend) for case in once for backend in case.backends]

    def child(key: Key) -> bool:
        command = [sys.executable, __file__, "--compile", json.dumps(key)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(*key, "failed:", (done.stderr.strip().splitlines() or ["killed"])[-1][:150], flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(10) as pool:
        return {key for key, works in zip(keys, pool.map(child, keys)) if works}


def run_once(key: Key) -> None:
    for run in Case(key.kind, key.dim, 2048).runs(key.backend)[:2]:
        run()
    torch.cuda.synchronize()


def cases() -> Iterator[Case]:
    """Those of one key of the table follow each other by length."""
    for dim in SQUARES:
        for kind in KINDS:
            lengths = DOCUMENTS[dim] if kind == "lists" else SQUARES[dim]
            yield from (Case(kind, dim, length) for length in lengths)


def measure(usable: set[Key]) -> dict[str, list[tuple[int, float]]]:
    """TFLOP/s as `kernels/rates.py` reads them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for case in cases():
        runs = {name: case.runs(name) for name in BACKENDS if Key(case.kind, case.dim, name) in usable}
        for at, direction in enumerate(DIRECTIONS):
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(ROUNDS):
                for backend, run in runs.items():
                    ms = do_bench(run[at], warmup=5, rep=20, return_mode="median")
                    best[backend] = min(best[backend], ms)
            for backend, (_, _, pairs) in runs.items():
                flops = (10 if direction == "backward" else 4) * HEADS * case.dim * pairs
                points = found.setdefault(f"{backend} {direction} {case.kind} {case.dim}", [])
                points.append((case.length, round(flops / best[backend] / 1e9, 1)))
    return {key: busy(points) if " lists " in key else points for key, points in found.items()}


def busy(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Without the first points of lists if the rate grows faster than the length from there: launches are what took
    the time then, and they are counted by themselves.

    Of squares they stay: the length says all of a square's work, but nothing of how many documents a row has.
    """
    for start in reversed(range(1, len(points))):
        (low, slow), (high, fast) = points[start - 1 : start + 1]
        if fast * low > slow * high:
            return points[start:]
    return points


def dump(tree: dict[str, Any]) -> str:
    """JSON with one line a key of the table, so that changes can be read."""
    tables = []
    for name, table in tree.items():
        lines = [f'  "{key}": {json.dumps(table[key])}' for key in ("device", "torch", "triton")]
        points = [f'   "{key}": {json.dumps(table["tflops"][key])}' for key in table["tflops"]]
        lines.append('  "tflops": {\n' + ",\n".join(points) + "\n  }")
        tables.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(tables) + "\n}\n"


def print_table(found: dict[str, list[tuple[int, float]]]) -> None:
    print(f"TFLOP/s in bf16, {HEADS} heads over {KV_HEADS}; lists by the length of their documents")
    for key in sorted(found, key=lambda key: key.split()[:0:-1]):
        print(f"{key:<36}" + "".join(f"{length:>8}:{rate:6.1f}" for length, rate in found[key]))


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


if __name__ == "__main__":
    main()
