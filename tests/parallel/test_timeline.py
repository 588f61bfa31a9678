"""Published figures from published constants, and what follows from the definition of a stage."""

from __future__ import annotations

import numpy as np
import pytest

from farspan.kernels import masks
from farspan.parallel import orders, plans
from farspan.parallel.plan import Block, Move, Piece, Plan, Schedule
from farspan.parallel.timeline import Link, Network, simulate


def _hierarchical(nodes: int, node: int) -> Plan:
    """Keys go round inside a node, and meanwhile those that the node began with go on to the next node."""
    world = nodes * node
    blocks = tuple(Block(side, rank, (0, 1), (0, 1)) for side in ("q", "kv") for rank in range(world))  # type: ignore[arg-type]
    moves, pieces = [], []
    for rank in range(world):
        at, local = divmod(rank, node)
        for outer in range(nodes):
            begun = (at - outer) % nodes * node
            first = outer * node
            if outer < nodes - 1:
                after = (at + 1) % nodes * node + local
                moves.append(Move(world + begun + local, rank, after, first, first + node, link="outer"))
            for inner in range(node):
                block = world + begun + (local - inner) % node
                pieces.append(Piece(rank, first + inner, (rank,), (block,)))
                if inner < node - 1:
                    after = at * node + (local + 1) % node
                    moves.append(Move(block, rank, after, first + inner, first + inner + 1, link="inner"))
    schedule = Schedule(tuple(moves), tuple(pieces))
    return Plan("hierarchical", world, (1, 1), blocks, schedule, Schedule((), ()))


def test_published_times_of_the_flat_and_of_the_hierarchical_ring() -> None:
    """Of MTraining (arXiv:2510.18830): a layer forward, 512K tokens on 32 GPUs in nodes of 8."""
    before, compute = 1.13e-3 + 2.08e-3, 0.51e-3  # the index and the host; one stage
    network = Network(inner=Link(1 / 0.13e-3), outer=Link(1 / 0.98e-3), ranks_per_node=8)
    order = orders.contiguous(32, 32)
    flat, hierarchical = plans.ring(order, masks.full(32), (1, 1)), _hierarchical(4, 8)
    seconds = {}
    for plan in (flat, hierarchical):
        stages = plan.forward.stages
        assert stages == 32
        sizes = np.ones(len(plan.forward.moves))
        timeline = simulate(plan, "forward", sizes, np.full((32, stages), compute), network)
        np.testing.assert_allclose(timeline.end, timeline.compute + timeline.exposed)
        seconds[plan.name] = before + timeline.seconds
    assert seconds["ring"] == pytest.approx(34.10e-3, abs=5e-6)
    assert seconds["hierarchical"] == pytest.approx(19.53e-3, abs=5e-6)


def _one_move(stop: int, compute: list[list[float]], link: Link) -> list[float]:
    blocks = tuple(Block(side, rank, (0, 1), (0, 1)) for side in ("q", "kv") for rank in range(2))  # type: ignore[arg-type]
    pieces = tuple(Piece(0, stage, (0,), (2,)) for stage in range(len(compute[0])))
    plan = Plan("one", 2, (1, 1), blocks, Schedule((Move(3, 1, 0, 0, stop),), pieces), Schedule((), ()))
    timeline = simulate(plan, "forward", np.array([10.0]), np.array(compute), Network(link, link, 2))
    return [*timeline.end.tolist(), *timeline.exposed.tolist()]


def test_a_transfer_runs_beside_the_stages_until_its_stop() -> None:
    slow = Link(bytes_per_second=2.0, latency=1.0)  # 6 seconds for the 10 bytes
    # 4 seconds of work hide 4 of the 6; the sender, who has none, waits for all.
    assert _one_move(1, [[4.0, 4.0], [0.0, 0.0]], slow) == [10.0, 6.0, 2.0, 6.0]
    assert _one_move(2, [[4.0, 4.0, 1.0], [0.0, 0.0, 0.0]], slow) == [9.0, 6.0, 0.0, 6.0]


def test_messages_of_one_rank_share_its_link() -> None:
    """All-gather: each rank sends its keys to three others at once, which takes as long as three messages."""
    order, mask = orders.contiguous(16, 4), masks.full(16)
    plan = plans.all_gather(order, mask, (1, 1))
    idle = np.zeros((4, plan.forward.stages))
    for per_node, expected in ((4, 3.0), (1, 30.0), (2, 20.0)):
        network = Network(Link(1.0), Link(0.1), per_node)
        timeline = simulate(plan, "forward", np.ones(len(plan.forward.moves)), idle, network)
        assert timeline.seconds == pytest.approx(expected)
