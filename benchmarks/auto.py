"""Is `auto` as fast as the best single backend? Times both on what training meets, forward and backward.

    python benchmarks/auto.py

Cases are whole masks, and the pieces of a zigzag ring's stages, which merge into fp32 totals. The ratio is that of
`auto` to the fastest backend that computes the case alone; run `benchmarks/rates.py` first. Takes about three minutes.
`same` is the ratio of `auto` to the backend that it chose: how far the same call differs from itself here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from farspan.kernels import BACKENDS, IntervalMask, attend, attend_backward, masks, row_delta
from farspan.kernels.choice import choose, in_words
from farspan.kernels.problem import Problem

HEADS, KV_HEADS = 32, 8
ROUNDS = 8


class Case(NamedTuple):
    name: str
    mask: IntervalMask
    keys: int
    accumulate: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    options = parser.parse_args()
    lines = []
    for dim in options.head_dims:
        for length in options.lengths:
            for case in cases(length):
                for name, problem, run in directions(case, dim):
                    lines.append(line(f"{case.name} {length} x {dim} {name}", case, problem, run))
    print(f"{'case':<44}{'auto ms':>9}{'best ms':>9}{'ratio':>7}{'same':>7}  {'best':<27}auto is")
    print("\n".join(lines))


def cases(length: int) -> list[Case]:
    """The ring's pieces are those of a rank that holds two chunks of half of `length` each."""
    causal, half = masks.causal(length), length // 2
    return [
        Case("causal", causal, length, False),
        Case("full", masks.full(length), length, False),
        Case("4 documents", masks.causal(length, range(0, length + 1, length // 4)), length, False),
        Case("window", masks.sliding_window(length, min(4096, half)), length, False),
        Case("ring: own keys", causal, length, True),
        Case("ring: keys before", rectangle(length, half), half, True),
        Case("ring: keys after", rectangle(half, length), length, True),
    ]


def rectangle(rows: int, keys: int) -> IntervalMask:
    zero = torch.zeros(1, rows, dtype=torch.int32)
    return IntervalMask(zero, zero + keys, zero, zero)


def directions(case: Case, dim: int) -> list[tuple[str, Problem, Callable[[str], Any]]]:
    def draw(length: int, heads: int) -> Tensor:
        return torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16)

    mask, rows = case.mask.to("cuda"), case.mask.rows
    q, dout = draw(rows, HEADS), draw(rows, HEADS)
    k, v = draw(case.keys, KV_HEADS), draw(case.keys, KV_HEADS)
    out, lse = attend(q, k, v, mask, backend="triton")
    delta = row_delta(dout, out)
    total = (out.float(), lse.clone()) if case.accumulate else None
    sums = tuple(torch.zeros_like(x, dtype=torch.float32) if case.accumulate else None for x in (q, k, v))

    def forward(backend: str) -> Any:
        return attend(q, k, v, mask, backend=backend, accumulate=total)

    def backward(backend: str) -> Any:
        return attend_backward(dout, q, k, v, out, lse, mask, delta=delta, backend=backend, accumulate=sums)

    return [
        ("forward", Problem.of(q, k, v, accumulate=case.accumulate), forward),
        ("backward", Problem.of(q, k, v, backward=True, accumulate=case.accumulate), backward),
    ]


def line(title: str, case: Case, problem: Problem, run: Callable[[str], Any]) -> str:
    times: dict[str, list[float]] = {}
    for backend in (name for name in BACKENDS if name != "reference"):
        try:
            run(backend)
        except ValueError:  # cannot take the problem or the mask
            continue
        times[backend] = []
    for _ in range(ROUNDS):  # in turns, for clocks drift
        for backend, rounds in times.items():
            rounds.append(do_bench(lambda backend=backend: run(backend), warmup=5, rep=15, return_mode="median"))
    found = {backend: statistics.median(rounds) for backend, rounds in times.items()}
    best = min((backend for backend in found if backend != "auto"), key=lambda backend: found[backend])
    auto = in_words(choose(problem, case.mask.to("cuda"), "auto").parts)
    # `auto` and the same backend by its name differ by noise alone.
    noise = f"{found['auto'] / found[auto]:.3f}" if auto in found else ""
    ratio = found["auto"] / found[best]
    return f"{title:<44}{found['auto']:>9.3f}{found[best]:>9.3f}{ratio:>7.3f}{noise:>7}  {best:<27}{auto}"


if __name__ == "__main__":
    main()
