"""What lies where among shards: everything once, as the drawing says, and the same elements in both divisions."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from farspan.trainer.checkpoint.reshard import _overlaps
from farspan.trainer.checkpoint.shards import ShardError, Shards

GROUPS = [{"a": 5, "b": 3}, {"c": 1, "d": 7, "e": 2}]


def shards_of(ranks: int, zero_stage: int, groups: list[dict[str, int]] = GROUPS) -> Shards:
    """As DeepSpeed cuts them: rows up to twice the ranks, and at ZeRO 3 three parameters to a flat tensor."""
    if zero_stage < 3:
        sizes = [2 * -(-sum(group.values()) // (2 * ranks)) for group in groups]
    else:
        parts = [-(-elements // ranks) for group in groups for elements in group.values()]
        sizes = [sum(parts[first : first + 3]) for first in range(0, len(parts), 3)]
    return Shards(groups, sizes, ranks, zero_stage)


def drawn(shards: Shards, rank: int) -> str:
    tensors = [["-"] * size for size in shards.sizes]
    for run in shards.runs(rank):
        tensors[run.flat][run.offset : run.offset + run.count] = run.name * run.count
    return "".join("".join(tensor) for tensor in tensors)


def test_the_drawing_of_the_module() -> None:
    groups = [{"a": 5, "b": 3, "c": 2}]
    drawing = {
        (1, 2): "aaaaab bbcc--",
        (2, 3): "aaaa abbb cc--",
        (3, 2): "aaabbc aa-b-c",
        (3, 3): "aabc aabc a-b-",
    }
    for (stage, ranks), expected in drawing.items():
        shards = shards_of(ranks, stage, groups)
        assert " ".join(drawn(shards, rank) for rank in range(ranks)) == expected


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_every_element_lies_in_one_shard(zero_stage: int) -> None:
    for ranks in range(1, 9):
        shards = shards_of(ranks, zero_stage)
        runs = [run for rank in range(ranks) for run in shards.runs(rank)]
        for name, elements in (item for group in GROUPS for item in group.items()):
            places = [(run.start, run.start + run.count) for run in runs if run.name == name]
            assert all(before[1] == after[0] for before, after in pairwise([(0, 0), *places, (elements, elements)]))


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_what_is_copied_fills_the_new_shards(zero_stage: int) -> None:
    for old, new in product(range(1, 8), repeat=2):
        was, now = shards_of(old, zero_stage), shards_of(new, zero_stage)
        for rank in range(new):
            filled = []
            for target, source, old_rank in _overlaps(was, now, rank):
                assert (target.name, target.start, target.count) == (source.name, source.start, source.count)
                assert any(
                    run.flat == source.flat and run.offset <= source.offset and run.name == source.name
                    for run in was.runs(old_rank)
                )
                filled += [(target.flat, target.offset + i) for i in range(target.count)]
            expected = [(run.flat, run.offset + i) for run in now.runs(rank) for i in range(run.count)]
            assert filled == expected


@pytest.mark.parametrize(
    ("groups", "sizes", "ranks", "zero_stage"),
    [
        ([{"a": 5}], [2], 2, 1),
        ([{"a": 5}], [3, 3], 2, 1),
        ([{"a": 5}], [2], 2, 3),
        ([{"a": 5}], [4], 2, 3),
        ([{"a": 5, "b": 2}], [2, 2], 2, 3),
    ],
)
def test_tensors_of_other_sizes_are_refused(
    groups: list[dict[str, int]], sizes: list[int], ranks: int, zero_stage: int
) -> None:
    with pytest.raises(ShardError):
        list(Shards(groups, sizes, ranks, zero_stage).runs(0))
