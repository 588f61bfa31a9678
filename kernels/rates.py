"""How fast each backend is, as measured (`benchmarks/rates.py`): what `backend="auto"` chooses by."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Literal

Kind = Literal["causal", "full", "lists"]


@dataclass(frozen=True)
class Rates:
    """TFLOP/s by backend, direction, kind and head dim, at several lengths, for one device.

    `points["cudnn forward causal 128"]` is `[(length, TFLOP/s), ...]`, ascending. Causal and full problems are square,
    of that length; lists are those of causal documents of that length, in a row with many of them. `name` is such as
    "sm_90"; `torch` and `triton` are the versions measured with.
    """

    name: str
    device: str
    torch: str
    triton: str
    points: dict[str, list[tuple[int, float]]]

    @property
    def backends(self) -> set[str]:
        return {key.split()[0] for key in self.points}

    def rate(self, backend: str, kind: Kind, backward: bool, length: float, dim: int) -> float:
        """TFLOP/s of one call; 0 where nothing was measured. Between lengths, linear in their logarithm.

        Of several head dims that were measured the nearest counts. Lists that were not measured count as causal.
        """
        start = f"{backend} {'backward' if backward else 'forward'} {kind} "
        dims = [int(key.removeprefix(start)) for key in self.points if key.startswith(start)]
        if not dims:
            return self.rate(backend, "causal", backward, length, dim) if kind == "lists" else 0.0
        points = self.points[start + str(min(dims, key=lambda measured: abs(math.log(measured / dim))))]
        if length <= points[0][0]:
            return points[0][1] * length / points[0][0]
        for (low, slow), (high, fast) in pairwise(points):
            if length <= high:
                share = math.log(length / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return points[-1][1]


def of_capability(capability: tuple[int, int]) -> Rates:
    """The table of a GPU: measured on its kind, or on the one whose compute capability is nearest."""
    number = 10 * capability[0] + capability[1]
    return min(_tables(), key=lambda table: abs(int(table.name.removeprefix("sm_")) - number))


@cache
def _tables() -> list[Rates]:
    tree = json.loads(files("farspan.kernels").joinpath("rates.json").read_text())
    return [
        Rates(
            name,
            table["device"],
            table["torch"],
            table["triton"],
            {key: [(int(length), float(rate)) for length, rate in points] for key, points in table["tflops"].items()},
        )
        for name, table in tree.items()
    ]
