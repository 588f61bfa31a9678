"""How much faster is sparse attention than dense attention, forward, backward, and with the estimation of its index?

    python benchmarks/sparse_attention.py --lengths 32768,131072 --densities 0.05,0.1 --output sparse_attention.jsonl

Indexes are drawn: the two nearest diagonals of 128 x 128 tiles and others whose distances are log-uniform, until the
share of causal tiles is reached, and `--columns` single keys a head. Peers on the same inputs: cuDNN and our kernels
on all causal pairs, and FlexAttention on the same tiles (without columns). The index is that of one estimation, whose
cost does not depend on what it finds. Times are of each pass alone, and of all in a row as a layer has them (`layer`):
estimation, forward, backward, among which the host may run ahead; that one is compared. On a CPU it runs the reference
backend, for trying it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import milliseconds
from torch import Tensor

from farspan.kernels import IntervalMask, attend, attend_backward, masks
from farspan.kernels.estimate import VerticalSlash
from farspan.kernels.index import Places, VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

_ROUNDS, _SECOND_MS = 3, 1000.0
Pass = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], default=[32768, 131072])
    parser.add_argument("--densities", type=lambda text: [float(x) for x in text.split(",")], default=[0.05, 0.1])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument(
        "--dense", action=argparse.BooleanOptionalAction, default=True, help="time dense attention, too"
    )
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="time FlexAttention, too")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {machine}, bf16, {options.heads} heads over {options.kv_heads}", flush=True)
    for length in options.lengths:
        inputs = Inputs(length, options.heads, options.kv_heads, options.head_dim, device)
        dense: dict[str, dict[str, float]] = {}
        if options.dense:
            for backend in ("cudnn", "triton") if device.type == "cuda" else ("reference",):
                dense[backend] = measured(*inputs.dense(backend))
                print(f"{length:,} tokens, dense {backend}: {in_words(dense[backend])}", flush=True)
        estimation = inputs.estimation()
        for density in options.densities:
            row = sparse_row(inputs, estimation, density, options.columns, options.flex)
            for name, times in dense.items():
                row |= {f"{name}_ms": times["layer_ms"], f"over_{name}": times["layer_ms"] / row["layer_ms"]}
            if "flex_ms" in row:
                row["over_flex"] = row["flex_ms"] / row["tiles_layer_ms"]
            row |= {"machine": machine, "torch": torch.__version__, "length": length, "columns": options.columns}
            print(
                " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True
            )
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


class Inputs:
    """Normal q, k, v and dout, the same on every run, under a causal mask."""

    def __init__(self, length: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> None:
        self.length, self.heads, self.device = length, heads, device
        generator = torch.Generator(device).manual_seed(0)

        def draw(count: int) -> Tensor:
            return torch.randn(1, length, count, dim, dtype=torch.bfloat16, device=device, generator=generator)

        self.q, self.k, self.v, self.dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
        self.host_mask = masks.causal(length)
        self.mask: IntervalMask = self.host_mask.to(device)
        positions = np.arange(length)
        self.places = Places.of(positions, positions, TILE, device)

    def dense(self, backend: str) -> tuple[Pass, Pass]:
        return self._passes(backend, None)

    def sparse(self, index: VerticalSlashIndex) -> tuple[Pass, Pass]:
        """As the executor runs it: the index's lists are made for each direction."""
        return self._passes("auto", index)

    def _passes(self, backend: str, index: VerticalSlashIndex | None) -> tuple[Pass, Pass]:
        given = self.q, self.k, self.v

        def selected() -> Any:
            return None if index is None else index.at(self.places)

        out, lse = attend(*given, self.mask, index=selected(), backend=backend)

        def forward() -> Any:
            return attend(*given, self.mask, index=selected(), backend=backend)

        def backward() -> Any:
            return attend_backward(self.dout, *given, out, lse, self.mask, index=selected(), backend=backend)

        return forward, backward

    def flex(self, index: VerticalSlashIndex) -> tuple[Pass, Pass]:
        """FlexAttention, compiled, on the index's tiles."""
        from torch._functorch import config
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        config.donated_buffer = False  # its backward runs more than once here

        tiles = index.at(self.places).tiles
        diagonal = torch.eye(tiles.shape[2], dtype=torch.bool, device=self.device)

        def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return chosen.sum(-1).int(), chosen.int().argsort(dim=-1, descending=True, stable=True).int()

        block_mask = BlockMask.from_kv_blocks(
            *listed(tiles & diagonal),
            *listed(tiles & ~diagonal),
            BLOCK_SIZE=TILE,
            mask_mod=lambda b, h, q, k: q >= k,
        )
        q, k, v, dout = (x.transpose(1, 2).detach() for x in (self.q, self.k, self.v, self.dout))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        compiled = torch.compile(flex_attention)

        def forward() -> Any:
            return compiled(*inputs, block_mask=block_mask, enable_gqa=True)

        out = forward()
        return forward, lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    def estimation(self) -> Pass:
        order = orders.contiguous(self.length, 1)
        estimator = Estimator(order, self.host_mask, VerticalSlash(), 0, None, self.device)
        return lambda: estimator(self.q, self.k)

    def index(self, density: float, columns: int) -> VerticalSlashIndex:
        return drawn_index(self.length, self.heads, density, columns, self.device)


def sparse_row(inputs: Inputs, estimation: Pass, density: float, columns: int, flex: bool) -> dict[str, Any]:
    index = inputs.index(density, columns)
    times = measured(*inputs.sparse(index), estimation)
    row: dict[str, Any] = {"density": float(index.density().mean()), "index_ms": median_ms(estimation), **times}
    if inputs.device.type == "cuda" and flex:
        tiles = inputs.index(density, 0)
        row |= {f"tiles_{name}": ms for name, ms in measured(*inputs.sparse(tiles)).items()}
        row["flex_ms"] = measured(*inputs.flex(tiles))["layer_ms"]
    return row


def drawn_index(length: int, heads: int, density: float, columns: int, device: torch.device) -> VerticalSlashIndex:
    """Each head draws its own, the same on every run."""
    blocks, draw = -(-length // TILE), np.random.default_rng(0)
    tiles = np.arange(blocks, 0, -1)  # of each diagonal
    diagonals = np.zeros((1, heads, blocks), bool)
    for chosen in diagonals[0]:
        chosen[:2] = True
        while (chosen * tiles).sum() < density * tiles.sum():
            chosen[int(np.exp(draw.uniform(0, np.log(blocks))))] = True
    drawn = [np.sort(draw.choice(length, max(columns, 1), replace=False)) for _ in range(heads)]
    listed = np.stack(drawn).astype(np.int32) if columns else np.full((heads, 1), length, np.int32)
    return VerticalSlashIndex(torch.from_numpy(diagonals).to(device), torch.from_numpy(listed)[None].to(device), length)


def measured(*passes: Pass) -> dict[str, float]:
    """Forward, backward, and what comes before them: each pass alone, and all in a row."""
    forward, backward, *before = passes

    def layer() -> None:
        for run in (*before, forward, backward):
            run()

    names = {"forward_ms": forward, "backward_ms": backward, "layer_ms": layer}
    return {name: median_ms(run) for name, run in names.items()}


def median_ms(run: Pass) -> float:
    """Of some rounds behind a first run, which finds no caches; one of what takes seconds."""
    cuda = torch.cuda.is_available()
    run()
    first = milliseconds(run, cuda)
    if not cuda or first > _SECOND_MS:
        return first
    return statistics.median([first, *(milliseconds(run, cuda) for _ in range(_ROUNDS - 1))])


def in_words(times: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_ms')} {ms:.2f} ms" for name, ms in times.items())


if __name__ == "__main__":
    main()
