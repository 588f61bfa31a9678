from __future__ import annotations

import numpy as np
import pytest
import torch

from farspan.parallel import orders

CASES = [(name, length, world) for name in orders.ORDERS for length in (1, 7, 64, 101) for world in (1, 2, 3, 8)]


@pytest.mark.parametrize(("name", "length", "world"), CASES)
def test_each_token_has_one_slot_and_comes_back(name: str, length: int, world: int) -> None:
    order = orders.build(name, length, world, stripe=4)
    everything = np.concatenate(order.positions)
    assert sorted(everything[everything < length]) == list(range(length))
    assert all((np.diff(positions) > 0).all() and len(positions) == order.slots for positions in order.positions)
    x = torch.randn(2, length, 3)
    shards = [order.shard(x, rank, padding=-100) for rank in range(world)]
    assert torch.equal(order.unshard(shards), x)
    for rank, shard in enumerate(shards):
        assert bool((shard[:, ~order.real(rank)] == -100).all())


def test_the_drawings_in_the_docstrings() -> None:
    def holders(order: orders.Order) -> list[int]:
        rank = np.empty(order.length, int)
        for r, positions in enumerate(order.positions):
            rank[positions] = r
        return rank.tolist()

    assert holders(orders.contiguous(8, 2)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert holders(orders.zigzag(8, 2)) == [0, 0, 1, 1, 1, 1, 0, 0]
    assert holders(orders.striped(8, 2, 2)) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert holders(orders.zigzag_documents([0, 4, 12], 2)) == [0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_zigzag_of_one_document_is_zigzag_and_empty_documents_are_nothing() -> None:
    expected = orders.zigzag(48, 4).positions
    for cu_seqlens in ([0, 48], [0, 0, 48, 48]):
        assert all(map(np.array_equal, orders.zigzag_documents(cu_seqlens, 4).positions, expected))


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.order is 'spiral'; possible are contiguous, zigzag, striped"):
        orders.build("spiral", 8, 2)
    with pytest.raises(ValueError, match=r"a document of 6 tokens .* a multiple of 4"):
        orders.zigzag_documents([0, 8, 14], 2)
    with pytest.raises(ValueError, match=r"parallel.stripe = 0"):
        orders.striped(8, 2, 0)
    with pytest.raises(ValueError, match=r"length 0"):
        orders.contiguous(0, 2)
