"""What do XAttention's and MoBA's choices cost on one GPU, in time and memory, and attention under them?

    python benchmarks/block_estimators.py --lengths 32768 131072 524288

Heads are those of Qwen2.5-3B, bf16. Queries of 128 neighbours are much alike, and so are keys, so that few tiles
matter. `untested`: attention under the same tiles as MoBA's, all of whose rows compute them; what is between is the
price of each row's own chunks. On a CPU it runs the reference backend, for trying it out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from attention import milliseconds
from torch import Tensor

from farspan.kernels import attend, attend_backward, masks
from farspan.kernels.block_index import BlockIndex
from farspan.kernels.estimate import MoBA, Settings, VerticalSlash, XAttention
from farspan.kernels.index import Index, Places
from farspan.kernels.tiles import TILE
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_MIB = 1 << 20
Pass = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 524288])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    lines = [
        f"{'tokens':>9}  {'index':<24}{'choice ms':>10}{'peak MiB':>10}{'density':>9}{'forward':>10}{'backward':>10}"
    ]
    for length in options.lengths:
        inputs = Inputs(length, options.heads, options.kv_heads, options.head_dim)
        chunk = max(TILE, length // 128)
        for name, settings in (
            ("vertical_slash", VerticalSlash()),
            ("xattention stride 8", XAttention(stride=8)),
            ("xattention stride 16", XAttention()),
            (f"moba {chunk}, top 12", MoBA(chunk, 12)),
        ):
            lines += inputs.lines(name, settings)
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


class Inputs:
    def __init__(self, length: int, heads: int, kv_heads: int, dim: int) -> None:
        self.length, self.host_mask = length, masks.causal(length)
        self.mask = self.host_mask.to(_DEVICE)
        positions = np.arange(length)
        self.places = Places.of(positions, positions, TILE, _DEVICE)
        generator = torch.Generator(_DEVICE).manual_seed(0)

        def draw(tokens: int, count: int) -> Tensor:
            return torch.randn(1, tokens, count, dim, dtype=torch.bfloat16, device=_DEVICE, generator=generator)

        def of_blocks(count: int) -> Tensor:
            return draw(-(-length // TILE), count).repeat_interleave(TILE, 1)[:, :length]

        self.q = 3 * of_blocks(heads) + draw(length, heads)
        self.k, self.v, self.dout = of_blocks(kv_heads) + draw(length, kv_heads), draw(length, kv_heads), self.q / 3

    def lines(self, name: str, settings: Settings) -> list[str]:
        choose = Estimator(orders.contiguous(self.length, 1), self.host_mask, settings, 0, None, _DEVICE)
        index, _ = choose(self.q, self.k)
        before = self._allocated()
        choose(self.q, self.k)
        peak = (torch.cuda.max_memory_allocated() - before) / _MIB if _DEVICE.type == "cuda" else float("nan")
        choice = median_ms(lambda: choose(self.q, self.k))
        found = [self._line(name, index, f"{choice:10.2f}{peak:10.0f}")]
        if isinstance(settings, MoBA):
            tiles = torch.cat([index.at(self.places, (h, h + 1)).tiles for h in range(index.heads)], 1)
            found.append(self._line("  its tiles, untested", BlockIndex.of(tiles, self.length), " " * 20))
        return found

    def _line(self, name: str, index: Index, cost: str) -> str:
        forward, backward = (median_ms(run) for run in self._passes(index))
        density = float(index.density().mean())
        return f"{self.length:9,}  {name:<24}{cost}{density:9.3f}{forward:10.2f}{backward:10.2f}"

    def _passes(self, index: Index) -> tuple[Pass, Pass]:
        given = self.q, self.k, self.v
        out, lse = attend(*given, self.mask, index=index.at(self.places))

        def forward() -> object:
            return attend(*given, self.mask, index=index.at(self.places))

        def backward() -> object:
            return attend_backward(self.dout, *given, out, lse, self.mask, index=index.at(self.places))

        return forward, backward

    def _allocated(self) -> int:
        if _DEVICE.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def median_ms(run: Pass) -> float:
    run()
    rounds = 3 if _DEVICE.type == "cuda" else 1
    return statistics.median(milliseconds(run, _DEVICE.type == "cuda") for _ in range(rounds))


if __name__ == "__main__":
    main()
