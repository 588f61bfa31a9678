"""Carries a plan out on clocks, one for each rank and for each of its links: what is hidden, and what is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from farspan.parallel.plan import Direction, Plan


class Link(NamedTuple):
    """Each way at once; a message takes its bytes over the bandwidth, and the latency beyond."""

    bytes_per_second: float
    latency: float = 0.0


@dataclass(frozen=True)
class Network:
    """Ranks count node by node; within a node they speak over `inner`, otherwise over `outer`. A rank has both."""

    inner: Link
    outer: Link
    ranks_per_node: int


@dataclass(frozen=True, eq=False)
class Timeline:
    """Seconds by rank `[world]`: when it is done, how long it computes, and how long it waits for what is to arrive."""

    end: np.ndarray
    compute: np.ndarray
    exposed: np.ndarray

    @property
    def seconds(self) -> float:
        return float(self.end.max())

    @property
    def exposed_seconds(self) -> float:
        """What the last rank to end has waited, for transfers or for ranks with more work."""
        return float(self.exposed[self.end.argmax()])


def simulate(plan: Plan, direction: Direction, sizes: np.ndarray, compute: np.ndarray, network: Network) -> Timeline:
    """One direction of a plan, as `execute` carries it out.

    At each stage a rank waits for what it receives and sends until then, posts what starts there, and computes. What
    goes from one rank to another is under way when both have posted it and have done with what they posted before on
    such links; it runs beside whatever they compute. Messages of one rank with one start and one stop share its link,
    and take as long as all of them together.

    Args:
        sizes: bytes of each move.
        compute: seconds of each rank at each stage, `[world, stages]`.
    """
    schedule = plan.schedule(direction)
    clock, exposed = np.zeros(plan.world), np.zeros(plan.world)
    due = np.zeros((schedule.stages, plan.world))
    # When the inner and the outer link of each rank are free.
    sending, receiving = np.zeros((2, plan.world)), np.zeros((2, plan.world))
    bundles = _bundles(plan, direction, sizes, network)
    for stage in range(schedule.stages):
        wait = np.maximum(due[stage] - clock, 0)
        exposed += wait
        clock += wait
        for bundle in bundles[stage]:
            outer, src, dst = bundle.outer, bundle.src, bundle.dst
            posted, free = np.maximum(clock[src], clock[dst]), np.maximum(sending[outer, src], receiving[outer, dst])
            end = np.maximum(posted, free) + bundle.seconds
            np.maximum.at(sending, (outer, src), end)
            np.maximum.at(receiving, (outer, dst), end)
            latency = np.where(outer, network.outer.latency, network.inner.latency)
            for rank in (src, dst):
                np.maximum.at(due[bundle.stop], rank, end + latency)
        clock += compute[:, stage]
    return Timeline(clock, compute.sum(1), exposed)


class _Bundle(NamedTuple):
    """What starts at one stage and stops at one: from `src` to `dst` over the outer (1) or inner link, in `seconds`."""

    stop: int
    src: np.ndarray
    dst: np.ndarray
    outer: np.ndarray
    seconds: np.ndarray


def _bundles(plan: Plan, direction: Direction, sizes: np.ndarray, network: Network) -> list[list[_Bundle]]:
    """By the stage that they start at, the earliest to stop first, as `Wire` posts them."""
    schedule, world = plan.schedule(direction), plan.world
    moves, stages = schedule.move_columns, schedule.stages
    number = ((moves.start * (stages + 1) + moves.stop) * world + moves.src) * world + moves.dst
    message, of_move = np.unique(number, return_inverse=True)
    bytes_ = np.bincount(of_move, weights=sizes, minlength=len(message))
    bundle, peers = np.divmod(message, world * world)
    first = np.flatnonzero(np.diff(bundle, prepend=-1)).tolist()
    found: list[list[_Bundle]] = [[] for _ in range(stages)]
    for begin, end in zip(first, [*first[1:], len(message)]):
        start, stop = divmod(int(bundle[begin]), stages + 1)
        src, dst = np.divmod(peers[begin:end], world)
        outer = (src // network.ranks_per_node != dst // network.ranks_per_node).astype(np.int64)
        seconds = bytes_[begin:end] / np.where(outer, network.outer.bytes_per_second, network.inner.bytes_per_second)
        sent, received = np.zeros((2, world)), np.zeros((2, world))
        np.add.at(sent, (outer, src), seconds)
        np.add.at(received, (outer, dst), seconds)
        found[start].append(_Bundle(stop, src, dst, outer, np.maximum(sent[outer, src], received[outer, dst])))
    return found
