"""How much does `parallel.sparse_wire` leave at home? Counted on the host, for any number of ranks.

    python benchmarks/sparse_wire.py --worlds 8,32,64

Bytes of forward and backward together, as shares of what dense attention sends on striped order; heads are those of
Qwen2.5-3B. Indexes are drawn: each head has the nearest diagonals and others of its own, log-uniform in distance, the
first 30 keys and columns anywhere. `context_parallel.py --density 0.05 --sparse-wire` times it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch

from farspan.kernels import masks
from farspan.kernels.index import VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.parallel import orders, plans
from farspan.parallel.sieve import Sieve, bytes_sent

HEADS, HEAD_DIM = (16, 2), 128
PLANS = ("ring", "all_gather")


class Pattern(NamedTuple):
    """What each head has: the nearest diagonals, others, and columns, the first 30 keys among them."""

    nearest: int
    others: int
    columns: int

    def __str__(self) -> str:
        return f"{self.nearest} nearest, {self.others} others, {self.columns} columns"


PATTERNS = (Pattern(8, 0, 30), Pattern(8, 0, 512), Pattern(2, 16, 512), Pattern(2, 60, 1000), Pattern(2, 200, 1000))


def draw(pattern: Pattern, length: int) -> VerticalSlashIndex:
    generator, blocks = np.random.default_rng(0), length // TILE
    diagonals = torch.zeros(1, HEADS[0], blocks, dtype=torch.bool)
    diagonals[..., : pattern.nearest] = True
    columns = torch.full((1, HEADS[0], pattern.columns), length, dtype=torch.int32)
    for head in range(HEADS[0]):
        distances = np.exp(generator.uniform(0, np.log(blocks), pattern.others)).astype(int)
        diagonals[0, head, distances] = True
        keys = np.unique(np.append(np.arange(30), generator.integers(0, length, pattern.columns - 30)))
        columns[0, head, : len(keys)] = torch.from_numpy(keys.astype(np.int32))
    return VerticalSlashIndex(diagonals, columns, length)


def count(length: int, worlds: list[int]) -> None:
    print(f"{length:,} tokens, {HEADS[0]} heads over {HEADS[1]} x {HEAD_DIM}, bf16: share of the bytes that are sent")
    print(f"{'each head has':<40}{'tiles':>8}" + "".join(f"{f'{plan} {w}':>15}" for w in worlds for plan in PLANS))
    mask = masks.causal(length)
    sieves = []
    for world in worlds:
        order = orders.striped(length, world, TILE)
        sieves += [Sieve(plans.build(plan, order, mask, HEADS), order, mask, 0, TILE, "cpu") for plan in PLANS]
    for pattern in PATTERNS:
        index = draw(pattern, length)
        line = f"{pattern!s:<40}{float(index.density().mean()):>8.2%}"
        for sieve in sieves:
            sent, whole = bytes_sent(sieve, index, HEAD_DIM, 1, 2)
            line += f"{sent / whole:>15.3f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=524_288)
    parser.add_argument("--worlds", default="8,32,64", help="numbers of ranks, with commas")
    arguments = parser.parse_args()
    count(arguments.length, [int(world) for world in arguments.worlds.split(",")])


if __name__ == "__main__":
    main()
