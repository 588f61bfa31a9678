"""Which elements of which parameters the shards of DeepSpeed's optimizer state hold, for any number of ranks.

A shard is a few flat tensors. At ZeRO 1 and 2 the parameters of a group stand in one row, which is cut into equal
parts: a flat tensor is one rank's part of one group. At ZeRO 3 each parameter is cut by itself, and a rank's parts
stand in a row, which goes on from one flat tensor to the next. Parameters a, b and c of 5, 3 and 2 elements, `-` for
padding:

    ZeRO 1, 2   2 ranks   aaaaab bbcc--           3 ranks   aaaa abbb cc--
    ZeRO 3      2 ranks   aaabbc aa-b-c           3 ranks   aabc aabc a-b-
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


class ShardError(ValueError):
    """Flat tensors do not have the sizes that the parameters and the number of ranks demand."""


@dataclass(frozen=True)
class Run:
    """`count` elements of the flattened parameter `name`, from `start` on; they lie from `offset` on in tensor `flat`
    of a shard."""

    name: str
    start: int
    count: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Shards:
    """`groups` has the number of elements of every parameter, by name and in order, for each group of parameters, and
    `sizes` that of every flat tensor of a shard."""

    groups: Sequence[Mapping[str, int]]
    sizes: Sequence[int]
    ranks: int
    zero_stage: int

    def runs(self, rank: int) -> Iterator[Run]:
        """What lies in the shard of `rank`, padding left out; ShardError where the sizes do not allow it."""
        return self._of_each_parameter(rank) if self.zero_stage == 3 else self._of_rows(rank)

    def _of_rows(self, rank: int) -> Iterator[Run]:
        if len(self.groups) != len(self.sizes):
            raise ShardError(f"{len(self.groups)} groups of parameters lie in {len(self.sizes)} flat tensors")
        for flat, (group, size) in enumerate(zip(self.groups, self.sizes)):
            first = rank * size  # the place in the row of this part's first element
            begin = 0
            for name, elements in group.items():
                start, stop = max(first - begin, 0), min(first + size - begin, elements)
                if start < stop:
                    yield Run(name, start, stop - start, flat, begin + start - first)
                begin += elements
            if begin > self.ranks * size:
                raise ShardError(f"{begin:,} elements lie in {self.ranks} tensors of {size:,}")

    def _of_each_parameter(self, rank: int) -> Iterator[Run]:
        flat = offset = 0
        for name, elements in (item for group in self.groups for item in group.items()):
            part = -(-elements // self.ranks)
            if flat < len(self.sizes) and offset == self.sizes[flat]:
                flat, offset = flat + 1, 0
            if flat == len(self.sizes) or offset + part > self.sizes[flat]:
                raise ShardError(f"{name} of {elements:,} elements, cut into {self.ranks}, overlaps two tensors")
            start, stop = rank * part, min((rank + 1) * part, elements)
            if start < stop:
                yield Run(name, start, stop - start, flat, offset)
            offset += part
        if (flat, offset) != (len(self.sizes) - 1, self.sizes[-1]):
            raise ShardError(f"flat tensors of {sum(self.sizes):,} elements hold more than the parameters")
