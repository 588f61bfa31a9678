from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from support.oracle import mask_cases
from support.plan_cases import ORDERS, order_case, plan_cases

from farspan.kernels import IntervalMask, masks
from farspan.parallel import orders, plans
from farspan.parallel.plan import Move, Piece, Plan, Schedule
from farspan.parallel.plans import Topology
from farspan.parallel.verify import PlanError, verify

WORLDS = (1, 2, 3, 4, 6, 8)


def _order(name: str, length: int, world: int) -> orders.Order:
    return orders.build(name, length, world, stripe=4)


def _check_all(world: int, order_names: Sequence[str], length: int, heads: tuple[int, int]) -> None:
    for order_name in order_names:
        order = order_case(order_name, length, world)
        for case, (name, topology) in product(mask_cases(length), plan_cases(world)):
            report = verify(plans.build(name, order, case.mask, heads, topology), order, case.mask)
            assert report.pairs == int(case.allowed.sum()), (case.name, name, topology)
            assert report.work["forward"].sum() == report.work["backward"].sum() == report.pairs * heads[0]


@pytest.mark.parametrize("world", WORLDS)
def test_every_plan_of_every_mask_and_order_is_right(world: int) -> None:
    for length, heads in ((45, (6, 2)), (64, (5, 1))):
        _check_all(world, ORDERS, length, heads)


@pytest.mark.full
@pytest.mark.parametrize("order_name", ORDERS)
@pytest.mark.parametrize("world", [12, 16, 32, 64])
def test_every_plan_is_right_up_to_64_ranks(world: int, order_name: str) -> None:
    for length, heads in ((45, (8, 4)), (193, (12, 3))):
        _check_all(world, [order_name], length, heads)


def test_each_row_of_keys_crosses_into_a_node_once() -> None:
    """Hierarchical ring, 4 nodes of 4: a block makes 3 outer hops and 3 inner ones in each node, whoever owns it."""
    order, mask = orders.zigzag(16 * 8, 16), masks.full(16 * 8)
    plan = plans.build("hierarchical_ring", order, mask, (4, 2), Topology(inner=4))
    hops = Counter((move.link, move.block) for move in plan.forward.moves)
    blocks = [index for index, block in enumerate(plan.blocks) if block.side == "kv"]
    assert {hops["outer", block] for block in blocks} == {3}
    assert {hops["inner", block] for block in blocks} == {4 * 3}
    crossings = [move for move in plan.forward.moves if move.src // 4 != move.dst // 4]
    assert all(move.link == "outer" and move.stop - move.start == 4 for move in crossings)
    assert max(Counter((move.block, move.dst // 4) for move in crossings).values()) == 1
    # Gradients: an inner round in every node, and one sum that goes from node to node and home.
    home = Counter((move.link, move.block) for move in plan.backward.moves if move.home)
    assert {home["outer", block] for block in blocks} == {3}
    assert {home["inner", block] for block in blocks} == {4 * 3}


def test_star_sends_the_anchor_once_and_nothing_else_of_keys() -> None:
    world, block = 8, 16
    length = world * block + 16
    roaming = np.zeros(length, bool)
    roaming[-16:] = True
    mask, order = masks.star(length, block, 8, [world * block]), orders.two_class(roaming, world, block)
    plan = plans.build("star", order, mask, (4, 2))
    operands = [move for move in plan.forward.moves if not move.home]
    anchors = [move for move in operands if plan.blocks[move.block].side == "kv"]
    assert sorted(move.dst for move in anchors) == list(range(1, world))
    assert {(plan.blocks[m.block].owner, plan.blocks[m.block].slots) for m in anchors} == {(0, (0, 8))}
    assert max(Counter(move.src for move in anchors).values()) == 3
    # Each rank's two roaming rows go to all others, whose partial results come back; their keys stay.
    assert len(operands) - len(anchors) == world * (world - 1)
    home = [move for move in plan.backward.moves if move.home and plan.blocks[move.block].side == "kv"]
    assert sorted(move.src for move in home) == list(range(1, world))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_bytes_equal_the_closed_form(world: int) -> None:
    """Full attention: each rank sends P - 1 times its keys and values; backward as much again and fp32 gradients."""
    slots, heads, dim, batch = 10, (6, 2), 16, 3
    kv = 2 * batch * slots * heads[1] * dim
    for name in orders.ORDERS:
        order = _order(name, slots * world * 4, world)
        mask = masks.full(order.length)
        ring = verify(plans.ring(order, mask, heads), order, mask, head_dim=dim, batch=batch)
        gather = verify(plans.all_gather(order, mask, heads), order, mask, head_dim=dim, batch=batch)
        operands = (world - 1) * kv * 4 * 2
        assert ring.bytes_sent("forward", 2, 4) == [operands] * world
        # With two ranks one rank alone computes for a foreign block, but the owner adds its own share: still fp32.
        assert ring.bytes_sent("backward", 2, 4) == [operands * 3] * world
        assert gather.bytes_sent("forward", 2, 4) == [operands] * world
        assert gather.bytes_sent("backward", 2, 4) == [operands * 3] * world
        assert ring.peak_slots["forward"] == 2 * slots * 4 * heads[1] if world > 2 else slots * 4 * heads[1]


def test_zigzag_is_balanced_and_contiguous_is_not() -> None:
    mask = masks.causal(4096)
    reports = {}
    for name in orders.ORDERS:
        order = orders.build(name, 4096, 8, stripe=16)
        reports[name] = verify(plans.ring(order, mask, (4, 4)), order, mask)
    assert reports["zigzag"].imbalance == pytest.approx(1)
    assert reports["zigzag"].stage_imbalance < 1.001
    assert reports["striped"].imbalance < 1.03
    assert reports["contiguous"].imbalance > 1.8


def test_nothing_travels_that_nobody_needs() -> None:
    order = orders.contiguous(64, 4)
    mask = masks.causal(64, [0, 16, 32, 48, 64])
    for name in ("ring", "all_gather"):
        plan = plans.build(name, order, mask, (4, 2))
        assert plan.forward.moves == plan.backward.moves == ()
    window = masks.sliding_window(64, 4)
    assert len(plans.ring(order, window, (4, 2)).forward.moves) == 3


@pytest.mark.parametrize("tokens", [1 << 20])
def test_a_million_tokens_take_seconds(tokens: int) -> None:
    order = orders.zigzag(tokens, 64)
    mask = masks.causal(tokens)
    report = verify(plans.ring(order, mask, (32, 8)), order, mask)
    assert report.pairs == tokens * (tokens + 1) // 2


def _broken(plan: Plan, direction: str, moves=None, pieces=None) -> Plan:  # type: ignore[no-untyped-def]
    schedule = getattr(plan, direction)
    moves = schedule.moves if moves is None else tuple(moves)
    pieces = schedule.pieces if pieces is None else tuple(pieces)
    return replace(plan, **{direction: Schedule(moves, pieces)})


def _base(name: str, order_name: str) -> tuple[Plan, orders.Order, IntervalMask]:
    order, mask = _order(order_name, 45, 4), masks.causal(45, [0, 20, 45])
    return plans.build(name, order, mask, (6, 2)), order, mask


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("order_name", orders.ORDERS)
@pytest.mark.parametrize("name", ["ring", "all_gather"])
def test_every_single_break_is_found(name: str, order_name: str, direction: str) -> None:
    """Each move and each piece in turn is dropped, doubled, sent to a wrong peer, or moved in time."""
    plan, order, mask = _base(name, order_name)
    verify(plan, order, mask)
    schedule = getattr(plan, direction)
    moves, pieces = list(schedule.moves), list(schedule.pieces)
    assert moves
    assert pieces
    mutants: list[tuple[str, Plan]] = []
    for i, move in enumerate(moves):
        rest = moves[:i] + moves[i + 1 :]
        mutants.append((f"dropped {move}", _broken(plan, direction, rest)))
        mutants.append((f"to itself {move}", _broken(plan, direction, [*rest, replace(move, dst=move.src)])))
        mutants.append((f"no such peer {move}", _broken(plan, direction, [*rest, replace(move, dst=4)])))
        owner = plan.blocks[move.block].owner
        # Sent further along the chain, or straight to its owner, a result would still come home: send it back.
        third = next(r for r in range(4) if r not in (move.src, move.dst))
        wrong = (move.src - 1) % 4 if move.home else third
        if wrong != owner and (move.home or _used_at(move, schedule)):
            mutants.append((f"wrong peer {move}", _broken(plan, direction, [*rest, replace(move, dst=wrong)])))
        late = replace(move, start=move.start + 90, stop=move.stop + 90)
        if _used_at(move, schedule):
            mutants.append((f"late {move}", _broken(plan, direction, [*rest, late])))
        if move.home:
            mutants.append((f"doubled {move}", _broken(plan, direction, [*moves, move])))
            early = replace(move, start=0, stop=1)
            mutants.append((f"early {move}", _broken(plan, direction, [*rest, early])))
        mutants.append((f"back in time {move}", _broken(plan, direction, [*rest, replace(move, stop=move.start)])))
    for i, piece in enumerate(pieces):
        rest_pieces = pieces[:i] + pieces[i + 1 :]
        mutants.append((f"dropped {piece}", _broken(plan, direction, pieces=rest_pieces)))
        mutants.append((f"doubled {piece}", _broken(plan, direction, pieces=[*pieces, piece])))
        elsewhere = replace(piece, rank=(piece.rank + 1) % 4)
        mutants.append((f"wrong rank {piece}", _broken(plan, direction, pieces=[*rest_pieces, elsewhere])))
    survived = []
    for description, mutant in mutants:
        try:
            verify(mutant, order, mask)
        except PlanError:
            continue
        survived.append(description)
    assert survived == []


def _used_at(move: Move, schedule: Schedule) -> bool:
    """Whether somebody counts on this operand at the stage in which it arrives."""
    uses = any(p.rank == move.dst and p.stage == move.stop and move.block in p.kv for p in schedule.pieces)
    forwards = any(m.src == move.dst and m.start == move.stop and m.block == move.block for m in schedule.moves)
    return not move.home and (uses or forwards)


def test_a_whole_dropped_stage_and_wrong_blocks_are_found() -> None:
    plan, order, mask = _base("ring", "zigzag")
    without = [piece for piece in plan.forward.pieces if piece.stage != 2]
    with pytest.raises(PlanError, match="never computed"):
        verify(_broken(plan, "forward", pieces=without), order, mask)
    with pytest.raises(PlanError, match="computed 2 times"):
        verify(_broken(plan, "backward", pieces=[*plan.backward.pieces, plan.backward.pieces[0]]), order, mask)
    with pytest.raises(PlanError, match="do not add up"):
        verify(replace(plan, blocks=plan.blocks[:-1]), order, mask)
    blocks = list(plan.blocks)
    blocks[0] = replace(blocks[0], heads=(0, 3))
    with pytest.raises(PlanError, match="do not add up"):
        verify(replace(plan, blocks=tuple(blocks)), order, mask)
    with pytest.raises(PlanError, match="kept names block"):
        verify(replace(plan, kept=frozenset({(0, len(plan.blocks) - 1), (0, 0)})), order, mask)
    with pytest.raises(PlanError, match="for 4 ranks, the order for 2"):
        verify(plan, orders.zigzag(45, 2), mask)


def test_heads_must_meet() -> None:
    order, mask = _order("contiguous", 45, 2), masks.causal(45)
    plan = plans.all_gather(order, mask, (6, 2))
    swapped = [p for p in plan.forward.pieces if p.stage == 0]
    first, other = swapped[0], next(p for p in plan.forward.pieces if p.stage == 1 and p.rank == swapped[0].rank)
    bad = Piece(first.rank, first.stage, first.q, other.kv)
    pieces = [bad if p is first else p for p in plan.forward.pieces]
    with pytest.raises(PlanError, match="do not meet"):
        verify(_broken(plan, "forward", pieces=pieces), order, mask)
