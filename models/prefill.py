"""What each context rank computes of a text that is read for the first time: three ways, one form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farspan.kernels import IntervalMask, masks
from farspan.parallel import orders, plans
from farspan.parallel.execute import Groups
from farspan.parallel.mesh import Mesh
from farspan.parallel.orders import Order
from farspan.parallel.prepare import PreparedPlan, prepare


@dataclass(frozen=True, eq=False)
class Share:
    """`positions` int64 `[slots]` of the text are computed here, by `plan`; those past `length` are padding.

    `kept` are the slots whose keys and values go into the cache: each token is kept by one rank.
    """

    length: int
    positions: NDArray[np.int64]
    kept: NDArray[np.int64]
    plan: PreparedPlan
    group: Groups


def dense(length: int, mesh: Mesh, heads: tuple[int, int]) -> Share:
    """Every token sees all before it: a zigzag ring. `heads` are query and kv heads of a tensor rank."""
    order = orders.zigzag(length, mesh.degrees.context)
    return _planned("ring", order, masks.causal(length), mesh, heads)


def star(length: int, block: int, anchor: int, mesh: Mesh, heads: tuple[int, int]) -> Share:
    """Tokens see their own block and the anchor, whose keys and values are sent to all ranks once a layer."""
    return _planned("star", _blocks(length, block, mesh), masks.star(length, block, anchor, [length]), mesh, heads)


def star_replicated(length: int, block: int, anchor: int, mesh: Mesh, heads: tuple[int, int]) -> Share:
    """The same results without communication: every rank computes the anchor for itself, in all layers.

    A rank computes all that its tokens see. What they see sees nothing else, so this is enough for every layer.
    """
    order, mask = _blocks(length, block, mesh), masks.star(length, block, anchor, [length])
    own = order.positions[mesh.context_rank][order.real(mesh.context_rank)]
    change = np.zeros(length + 1, np.int64)
    for begin, end in ((mask.begin, mask.end), (mask.anchor_begin, mask.anchor_end)):
        np.add.at(change, begin[0, own].numpy(), 1)
        np.add.at(change, end[0, own].numpy(), -1)
    positions = np.flatnonzero(change.cumsum())
    if not len(own):  # a text of fewer blocks than ranks; padding, for there is no call of no rows
        positions = np.array([length])
    alone, local = orders.contiguous(len(positions), 1), mask.at(positions, positions)
    plan = plans.build("single", alone, local, heads)
    prepared = prepare(plan, alone, local, 0, mesh.device)
    return Share(length, positions, np.flatnonzero(np.isin(positions, own)), prepared, None)


def _blocks(length: int, block: int, mesh: Mesh) -> Order:
    return orders.two_class(np.zeros(length, bool), mesh.degrees.context, block)


def _planned(name: str, order: Order, mask: IntervalMask, mesh: Mesh, heads: tuple[int, int]) -> Share:
    rank = mesh.context_rank
    prepared = prepare(plans.build(name, order, mask, heads), order, mask, rank, mesh.device)
    return Share(order.length, order.positions[rank], np.flatnonzero(order.real(rank)), prepared, mesh.links)
