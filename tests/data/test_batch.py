"""From rows to what each rank holds: permuted once, labels first, nothing lost and nothing twice."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from farspan.data.batch import make_batch
from farspan.data.rows import Row
from farspan.data.visibility import Visibility
from farspan.parallel import orders

LENGTH = 37
WORLDS = (1, 2, 3, 4, 8)
# Documents of the two rows of a batch: odd lengths, single tokens; the first row's last document goes on after it.
ENDS = ([1, 12, 12 + 17, LENGTH], [20, 21, 22, LENGTH])


def row(number: int) -> Row:
    """Tokens 1000 * number + 1, 2, 3 ...; written from the definition of labels and positions."""
    ends = ENDS[number]
    tokens = 1000 * number + 1 + np.arange(LENGTH)
    labels, positions = tokens + 1, np.arange(LENGTH)
    for begin, end in pairwise([0, *ends]):
        positions[begin:end] -= begin
        if end < LENGTH or number == 1:
            labels[end - 1] = -100
    return Row(tokens, labels, np.array([0, *ends]), positions, int((labels != -100).sum()))


ROWS = [row(0), row(1)]


@pytest.mark.parametrize(("name", "world"), list(product(orders.ORDERS, WORLDS)))
def test_all_ranks_together_hold_the_rows(name: str, world: int) -> None:
    order = orders.build(name, LENGTH, world, stripe=3)
    batches = [make_batch(ROWS, order, rank, samples=(5, 9)) for rank in range(world)]
    assert torch.equal(order.unshard([b.tokens for b in batches]), torch.from_numpy(np.stack([r.tokens for r in ROWS])))
    assert torch.equal(order.unshard([b.labels for b in batches]), torch.from_numpy(np.stack([r.labels for r in ROWS])))
    positions = order.unshard([b.rotary_positions for b in batches])
    assert torch.equal(positions, torch.from_numpy(np.stack([r.positions for r in ROWS])))
    assert sum(batch.valid for batch in batches) == sum(r.valid for r in ROWS)
    for batch in batches:
        assert batch.samples == (5, 9)
        for tensor in (batch.tokens, batch.labels, batch.rotary_positions):
            assert tensor.dtype == torch.int64
            assert tensor.shape == (2, order.slots)


@pytest.mark.parametrize(("name", "world"), list(product(orders.ORDERS, WORLDS)))
def test_labels_are_shifted_before_the_order(name: str, world: int) -> None:
    """A label is the token after its own in the text, wherever that token is held; else it has no label."""
    order = orders.build(name, LENGTH, world, stripe=3)
    for rank in range(world):
        batch = make_batch(ROWS, order, rank)
        labelled = batch.labels != -100
        assert torch.equal(batch.labels[labelled], batch.tokens[labelled] + 1)
        assert batch.valid == int(labelled.sum())
        padding = torch.from_numpy(~order.real(rank))
        assert not bool(labelled[:, padding].any())
        # In a shifted shard a slot's label would often be the next slot's token; here it is so only inside a run.
        apart = torch.from_numpy(np.diff(order.positions[rank]) != 1)
        assert not bool((batch.labels[:, :-1] == batch.tokens[:, 1:])[:, apart].any())


@pytest.mark.parametrize("across_documents", [False, True])
def test_who_sees_whom(across_documents: bool) -> None:
    """The mask is that of the whole rows, the same on every rank."""
    order = orders.zigzag(LENGTH, 3)
    for rank in range(3):
        seen = Visibility(across_documents)
        mask = make_batch(ROWS, order, rank, visibilities=[seen]).masks[seen]
        visible = mask.visible(slice(0, LENGTH), slice(0, LENGTH)).expand(2, LENGTH, LENGTH)
        for number, ends in enumerate(ENDS):
            document = [sum(end <= x for end in ends) for x in range(LENGTH)]
            expected = [
                [k <= q and (across_documents or document[q] == document[k]) for k in range(LENGTH)]
                for q in range(LENGTH)
            ]
            assert torch.equal(visible[number], torch.tensor(expected))


def test_across_documents_rotary_positions_do_not_restart() -> None:
    order = orders.striped(LENGTH, 2, 4)
    batches = [make_batch(ROWS, order, rank, visibilities=[Visibility(across_documents=True)]) for rank in range(2)]
    assert torch.equal(order.unshard([b.rotary_positions for b in batches]), torch.arange(LENGTH).expand(2, LENGTH))
    assert torch.equal(order.unshard([b.labels for b in batches]), torch.from_numpy(np.stack([r.labels for r in ROWS])))


def test_a_rank_may_be_without_any_label() -> None:
    blind = Row(ROWS[0].tokens, np.full(LENGTH, -100), ROWS[0].cu_seqlens, ROWS[0].positions, 0)
    assert make_batch([blind], orders.zigzag(LENGTH, 2), 1).valid == 0
