"""Every plan that a number of ranks can carry out, and every order, two-class orders included."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from farspan.parallel import orders
from farspan.parallel.plans import ONE_RING, Topology


class PlanCase(NamedTuple):
    plan: str
    topology: Topology = ONE_RING


ORDERS = (*orders.ORDERS, "two_class")


def plan_cases(world: int) -> list[PlanCase]:
    if world == 1:
        return [PlanCase("single")]
    cases = [PlanCase(name) for name in ("ring", "all_gather", "group_cast", "ulysses", "star")]
    halves = [inner for inner in (world // 2, 2) if inner > 1 and world % inner == 0 and inner < world]
    for inner in dict.fromkeys(halves):
        cases.append(PlanCase("hierarchical_ring", Topology(inner=inner)))
        cases.append(PlanCase("usp", Topology(ulysses=inner)))
    if world >= 8:
        cases.append(PlanCase("usp", Topology(inner=2, ulysses=world // 4)))
    return cases


def order_case(name: str, length: int, world: int) -> orders.Order:
    """Of a two-class order the last fifth of the row and two tokens in its middle roam."""
    if name != "two_class":
        return orders.build(name, length, world, stripe=4)
    roaming = np.zeros(length, bool)
    roaming[-max(1, length // 5) :] = True
    roaming[length // 2 - 2 : length // 2] = True
    return orders.two_class(roaming, world, align=4)
