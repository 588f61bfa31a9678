"""Plans: pure functions from (order, mask, heads) and the ranks' topology to a `Plan`.

`mask` is in positions of the packed row, `heads` is (query heads, kv heads) of one tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from farspan.kernels import IntervalMask
from farspan.parallel.orders import Order
from farspan.parallel.plan import Plan
from farspan.parallel.plans.direct import all_gather, group_cast, star
from farspan.parallel.plans.ring import ring

__all__ = [
    "CUT_ANYWHERE",
    "KEYS_TRAVEL",
    "ONE_RING",
    "PLANS",
    "Topology",
    "all_gather",
    "build",
    "group_cast",
    "ring",
    "star",
]

PLANS = ("single", "ring", "hierarchical_ring", "all_gather", "group_cast", "ulysses", "usp", "star")
# Plans whose blocks begin and end with any token, and not with tiles.
CUT_ANYWHERE = ("group_cast", "star")
# Plans in which keys and values travel, and queries do not.
KEYS_TRAVEL = ("ring", "hierarchical_ring", "all_gather")
_DIRECT = {"all_gather": all_gather, "group_cast": group_cast, "star": star}


@dataclass(frozen=True)
class Topology:
    """How ranks that share a sequence are near each other: outer x inner x ulysses, neighbours first in `ulysses`.

    `inner`: ranks of an inner ring, such as those of a node (plans hierarchical_ring, and usp where it is given).
    `ulysses`: ranks that exchange heads (plan usp).
    """

    inner: int | None = None
    ulysses: int | None = None

    def degrees(self, name: str, world: int) -> tuple[int, int]:
        """(inner, ulysses) of the plan called `name`; ValueError, naming the key to change, if they cannot be."""
        inner, ulysses = None, 1
        if name == "ulysses":
            ulysses = world
        if name == "usp":
            ulysses = _divisor("parallel.ulysses", self.ulysses, name, world)
        if name == "hierarchical_ring" or (name == "usp" and self.inner is not None):
            inner = _divisor("parallel.inner", self.inner, name, world // ulysses)
        return inner or world // ulysses, ulysses


ONE_RING = Topology()


def build(
    name: str,
    order: Order,
    mask: IntervalMask,
    heads: tuple[int, int],
    topology: Topology = ONE_RING,
    gradient_wire: Literal["fp32", "bf16"] = "fp32",
) -> Plan:
    """The plan called `name` in the configuration (`PLANS`); `gradient_wire` is what partial gradients travel in."""
    if name not in PLANS:
        raise ValueError(f"parallel.plan is {name!r}; possible are {', '.join(PLANS)}")
    if name == "single" and order.world != 1:
        raise ValueError(
            f"parallel.plan 'single' holds a row on one rank, but parallel.context is {order.world}; take 'ring'"
        )
    if name in _DIRECT:
        plan = _DIRECT[name](order, mask, heads)
    else:
        inner, ulysses = topology.degrees(name, order.world)
        plan = ring(order, mask, heads, name=name, inner=inner, ulysses=ulysses)
    return replace(plan, gradient_wire=gradient_wire)


def _divisor(key: str, given: int | None, name: str, ranks: int) -> int:
    possible = [n for n in range(1, ranks + 1) if ranks % n == 0]
    if given not in possible:
        said = "is not given" if given is None else f"is {given}"
        raise ValueError(
            f"parallel.plan {name} divides {ranks} ranks by {key}, which {said}; possible are "
            f"{', '.join(map(str, possible))}"
        )
    return given
