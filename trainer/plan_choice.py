"""`parallel.plan: auto`: the plan that the time model expects to be the fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from farspan.data.rows import Row
from farspan.data.visibility import Visibility
from farspan.kernels import IntervalMask
from farspan.parallel import balance, plans
from farspan.parallel.cluster import Cluster, load_cluster
from farspan.parallel.cost import NoRatesError, choose, compute_seconds
from farspan.parallel.orders import Order
from farspan.parallel.pairs import VisiblePairs, visible_pairs
from farspan.parallel.plan import DIRECTIONS, Direction, Plan
from farspan.parallel.timeline import Timeline, simulate
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.describe_backends import attention_problem
from farspan.trainer.expected_work import expected_work


def build_plan(config: RunConfig, name: str, order: Order, mask: IntervalMask) -> Plan:
    """The plan called `name` for one tensor rank's heads."""
    parallel, heads = config.parallel, config.model.heads_of_rank(config.parallel.tensor)
    return plans.build(name, order, mask, heads, parallel.topology, parallel.gradient_wire)


class NamedPlan(NamedTuple):
    """The name of a plan, with the reason where it was chosen."""

    name: str
    reason: str | None


def plan_names(config: RunConfig, arrangement: Arrangement, rows: Sequence[Row]) -> dict[Visibility, NamedPlan]:
    """For each way in which some layers see their rows, judged by `rows`; see `plan_name`."""
    order = arrangement.order(rows)
    kinds = list(dict.fromkeys(arrangement.layers))

    work = expected_work(config) if config.parallel.plan == "auto" else None

    def named(seen: Visibility) -> NamedPlan:
        density = 1.0 if work is None or seen.window else work.density
        name, reason = plan_name(config, order, lambda: arrangement.masks(rows)[seen], density)
        return NamedPlan(name, f"for {seen.in_words}, {reason}" if reason and len(kinds) > 1 else reason)

    return {seen: named(seen) for seen in kinds}


def plan_name(config: RunConfig, order: Order, mask: Callable[[], IntervalMask], density: float = 1.0) -> NamedPlan:
    """`parallel.plan`; for `auto` the plan chosen for a mask, and one line that says why.

    `density` is the share of what the mask shows that is computed, see `compute_seconds`. A pure function of the
    configuration, the mask and that, so all ranks that are given the same mask agree. ConfigError when there are no
    rates to choose by.
    """
    if config.parallel.plan != "auto":
        return NamedPlan(config.parallel.plan, None)
    if order.world == 1:
        return NamedPlan("single", "parallel.plan auto is single: a sequence is on one rank")
    cluster, rows = load_cluster(config.cluster), mask()

    def seconds(plan: Plan) -> float:
        elements = {
            d: balance.elements(plan, d, config.model.head_dim, config.train.micro_batch_rows) for d in DIRECTIONS
        }
        try:
            pairs = visible_pairs(plan, order, rows)
            timelines = predict_attention(config, cluster, plan, order, pairs, elements, density)
        except NoRatesError:
            return math.inf
        return sum(timeline.seconds for timeline in timelines.values())

    plan, found = choose(_legal(config, order, rows), seconds)
    if math.isinf(found[plan.name]):
        raise ConfigError(
            f"parallel.plan auto goes by measured rates, and there are none for attention.backend "
            f"{config.attention.backend}; set parallel.plan to {', '.join(found)}"
        )
    ranking = ", ".join(
        f"{name} {1e3 * found[name]:,.2f} ms" if math.isfinite(found[name]) else f"{name} unknown"
        for name in sorted(found, key=lambda name: found[name])
    )
    return NamedPlan(
        plan.name,
        f"parallel.plan auto is {plan.name}: attention of one layer, both directions, is expected to take {ranking} "
        f"(cluster {config.cluster}){_not_judged(config, order.world)}",
    )


def _not_judged(config: RunConfig, world: int) -> str:
    """The plans that another key lets be judged; all others that are missing cannot be made of these rows."""
    missing = []
    for name, key in (("hierarchical_ring", "parallel.inner"), ("usp", "parallel.ulysses")):
        try:
            config.parallel.topology.degrees(name, world)
        except ValueError:
            missing.append(f"{name} (set {key} to a divisor of {world})")
    return f"; not judged: {', '.join(missing)}" if missing else ""


def predict_attention(
    config: RunConfig,
    cluster: Cluster,
    plan: Plan,
    order: Order,
    visible: VisiblePairs,
    elements: Mapping[Direction, np.ndarray],
    density: float = 1.0,
) -> dict[Direction, Timeline]:
    """One layer's attention, at the rates of bf16, which are the ones that were measured; `density` as there."""
    tensors = replace(attention_problem(config, cluster.compute_capability), dtype=torch.bfloat16)
    sizes = np.array([2 if config.train.dtype == "bf16" else 4, 4])
    return {
        direction: simulate(
            plan,
            direction,
            elements[direction] @ sizes,
            compute_seconds(plan, direction, order, visible, tensors, config.attention.backend, density),
            cluster.network(config.parallel.tensor),
        )
        for direction in DIRECTIONS
    }


def _legal(config: RunConfig, order: Order, mask: IntervalMask) -> Iterator[Plan]:
    """All plans that can be made of this order and mask, in the order of `PLANS`."""
    for name in plans.PLANS:
        if config.attention.sparse is not None and name in plans.CUT_ANYWHERE:
            continue
        if config.parallel.sparse_wire and name not in plans.KEYS_TRAVEL:
            continue
        try:
            yield build_plan(config, name, order, mask)
        except ValueError:  # says what stands in the way of this plan, and others are asked for
            continue
