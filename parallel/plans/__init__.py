"""Plans: pure functions from (order, mask, heads) to a `Plan`.

`mask` is in positions of the packed row, `heads` is (query heads, kv heads) of one tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Plan
from farspan.parallel.plans.exchange import all_gather
from farspan.parallel.plans.ring import ring

__all__ = ["PLANS", "all_gather", "build", "ring", "single"]


def single(order: Order, mask: IntervalMask, heads: tuple[int, int]) -> Plan:
    """One rank holds the whole row: the ring of one, which sends nothing."""
    if order.world != 1:
        raise ValueError(
            f"parallel.plan 'single' holds a row on one rank, but parallel.context is {order.world}; take 'ring'"
        )
    return ring(order, mask, heads, name="single")


PLANS: dict[str, Callable[[Order, IntervalMask, tuple[int, int]], Plan]] = {
    "single": single,
    "ring": ring,
    "all_gather": all_gather,
}


def build(name: str, order: Order, mask: IntervalMask, heads: tuple[int, int]) -> Plan:
    """The plan called `name` in the configuration (`PLANS`)."""
    if name not in PLANS:
        raise ValueError(f"parallel.plan is {name!r}; possible are {', '.join(PLANS)}")
    return PLANS[name](order, mask, heads)
