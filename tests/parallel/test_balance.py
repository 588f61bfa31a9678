"""Crossings of nodes, traffic by link, and work by stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from farspan.kernels import masks
from farspan.parallel import balance, orders, plans
from farspan.parallel.plan import Schedule
from farspan.parallel.verify import verify


@pytest.mark.parametrize(("name", "times"), [("ring", 1), ("all_gather", 3)])
def test_how_often_a_block_enters_a_node(name: str, times: int) -> None:
    order, mask = orders.contiguous(48, 6), masks.full(48)
    plan = plans.build(name, order, mask, (2, 1))
    for direction in ("forward", "backward"):
        assert balance.crossings(plan, direction, 3) == times  # type: ignore[arg-type]
        assert balance.crossings(plan, direction, 6) == 0  # type: ignore[arg-type]


def test_bytes_by_link_add_up() -> None:
    order, mask = orders.zigzag(48, 4), masks.causal(48)
    plan = plans.ring(order, mask, (4, 2))
    moves = [replace(m, link="outer" if m.src // 2 != m.dst // 2 else "inner") for m in plan.backward.moves]
    plan = replace(plan, backward=Schedule(tuple(moves), plan.backward.pieces))
    report = verify(plan, order, mask, head_dim=8)
    assert report.links == ("inner", "outer")
    whole, inner, outer = (np.array(report.bytes_sent("backward", 2, 4, link)) for link in (None, "inner", "outer"))
    np.testing.assert_array_equal(inner + outer, whole)
    assert inner[0] > 0
    assert inner[1] == outer[0] == 0  # rank 0 sends inside its node, rank 1 to the other one
    assert report.bytes_sent("forward", 2, 4, "outer") == [0] * 4
    assert report.moves("backward", "inner") + report.moves("backward", "outer") == len(moves)
    assert report.bytes_by_stage("backward", 2, 4).sum(1).tolist() == whole.tolist()


def test_work_by_rank_and_stage_of_a_causal_ring() -> None:
    order, mask = orders.contiguous(24, 3), masks.causal(24)
    report = verify(plans.ring(order, mask, (4, 2)), order, mask)
    causal, full = 4 * 8 * 9 // 2, 4 * 64
    expected = [[causal, 0, 0], [causal, full, 0], [causal, full, full]]
    assert report.work["forward"].tolist() == expected
    assert report.imbalance == pytest.approx((causal + 2 * full) * 3 / (3 * causal + 3 * full))
    assert report.stage_imbalance == pytest.approx((causal + 2 * full) * 3 / (3 * causal + 3 * full))
