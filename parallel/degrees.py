"""How many ways each axis of the mesh is split."""

from __future__ import annotations

import re
from dataclasses import dataclass


class MeshError(ValueError):
    """The number of processes cannot be divided as the configuration asks."""


@dataclass(frozen=True)
class Degrees:
    """How many ways each axis is split. Ranks count tensor first, then context, then data."""

    data: int
    context: int
    tensor: int

    @property
    def world(self) -> int:
        return self.data * self.context * self.tensor

    @property
    def shard(self) -> int:
        """Ranks that share optimizer state, and over which gradients are summed."""
        return self.data * self.context

    def context_groups(self) -> list[list[int]]:
        """The ranks that share a sequence, each group once."""
        return [list(ranks[i : i + self.context]) for ranks in self._shards for i in range(0, self.shard, self.context)]

    def batch_groups(self) -> list[list[int]]:
        """The ranks that hold the same part of different data, each group once."""
        return [list(ranks[i :: self.context]) for ranks in self._shards for i in range(self.context)]

    @property
    def _shards(self) -> list[range]:
        return [range(tensor_rank, self.world, self.tensor) for tensor_rank in range(self.tensor)]

    def with_context(self, context: int) -> Degrees:
        """The same ranks with another context degree, a divisor of data x context."""
        if self.shard % context:
            raise MeshError(f"{self.shard} data x context ranks cannot be divided into groups of {context}")
        return Degrees(self.shard // context, context, self.tensor)

    @classmethod
    def divide(cls, world: int, context: int, tensor: int) -> Degrees:
        """The data degree that `world` processes leave; MeshError, with the nearest possible degrees, if none."""
        if min(world, context, tensor) < 1:
            raise MeshError(
                f"processes {world}, parallel.context {context} and parallel.tensor {tensor} must be 1 or more"
            )
        if world % (context * tensor):
            raise MeshError(
                f"{_count(world)} cannot be divided into parallel.context {context} x parallel.tensor {tensor}; "
                f"possible are {_nearest(world, context, tensor)}"
            )
        return cls(world // (context * tensor), context, tensor)

    @classmethod
    def parse(cls, text: str) -> Degrees:
        """The degrees whose `str` this is; MeshError if it is none's."""
        found = re.fullmatch(r"data (\d+) x context (\d+) x tensor (\d+)", text)
        if found is None:
            raise MeshError(f"{text!r} is no division of ranks such as {cls(1, 2, 1)}")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"data {self.data} x context {self.context} x tensor {self.tensor}"


def _nearest(world: int, context: int, tensor: int) -> str:
    below = world // (context * tensor) * context * tensor
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    pairs = [(c, t) for t in divisors for c in divisors if world % (c * t) == 0]
    pairs.sort(key=lambda pair: (abs(pair[1] - tensor) + abs(pair[0] - context), pair[1] != tensor))
    choices = [f"context {c} x tensor {t}" for c, t in pairs[:3]]
    counts = [str(n) for n in (below, below + context * tensor) if n]
    others = f"these degrees with {' or '.join(counts)} processes (launch.processes)"
    return f"{', '.join(choices)} with {_count(world)}, or {others}"


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
