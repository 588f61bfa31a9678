"""How fast each backend is, as measured: what `backend="auto"` chooses by."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise

import torch

# Launches, and merging a part into the whole.
_CALL_SECONDS = 30e-6


@dataclass(frozen=True)
class Rates:
    """TFLOP/s by backend, direction, kind and head dim, at several lengths, for one device.

    `points["cudnn forward causal 128"]` is `[[length, TFLOP/s], ...]`, ascending, of square problems.
    """

    device: str
    points: dict[str, list[tuple[int, float]]]

    @property
    def backends(self) -> set[str]:
        return {key.split()[0] for key in self.points}

    def rate(self, backend: str, causal: bool, backward: bool, length: float, dim: int) -> float:
        """TFLOP/s of one call; 0 where nothing was measured. Between lengths, linear in their logarithm."""
        kind, direction = ("causal" if causal else "full"), ("backward" if backward else "forward")
        dims = sorted({int(key.split()[3]) for key in self.points if key.startswith(f"{backend} {direction} {kind} ")})
        if not dims:
            return 0.0
        near = min(dims, key=lambda measured: abs(math.log(measured / dim)))
        points = self.points[f"{backend} {direction} {kind} {near}"]
        if length <= points[0][0]:
            return points[0][1] * length / points[0][0]
        for (low, slow), (high, fast) in pairwise(points):
            if length <= high:
                share = math.log(length / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return points[-1][1]

    def seconds(
        self, backend: str, causal: bool, backward: bool, rows: int, keys: int, pairs: int, heads: int, dim: int
    ) -> float:
        """Expected time of one call; infinite where the backend was not measured."""
        rate = self.rate(backend, causal, backward, math.sqrt(rows * keys), dim)
        flops = (10 if backward else 4) * heads * dim * pairs
        return math.inf if rate == 0 else _CALL_SECONDS + flops / (rate * 1e12)


def of_device(device: torch.device) -> Rates:
    """The table of a GPU: measured on its kind, or on the one whose compute capability is nearest."""
    major, minor = torch.cuda.get_device_capability(device)
    tables = _tables()
    return tables[min(tables, key=lambda name: abs(int(name.removeprefix("sm_")) - (10 * major + minor)))]


@cache
def _tables() -> dict[str, Rates]:
    tree = json.loads(files("farspan.kernels").joinpath("rates.json").read_text())
    return {
        name: Rates(
            table["device"], {key: [(int(n), float(r)) for n, r in points] for key, points in table["tflops"].items()}
        )
        for name, table in tree.items()
    }
