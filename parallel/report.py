"""What is known of a plan once it is verified."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farspan.parallel import balance
from farspan.parallel.columns import cells
from farspan.parallel.pairs import VisiblePairs
from farspan.parallel.plan import DIRECTIONS, Direction, Plan


@dataclass(frozen=True, eq=False)
class Report:
    """What `verify` found out about a plan that is right.

    `visible`: pairs between blocks. `work`, by direction: visible pairs x query heads, `[world, stages]`; `elements`:
    what each move carries, `[moves, 2]` (see `balance`). `peak_slots`: the most foreign slots x kv heads that a rank
    holds at once.
    """

    plan: Plan
    visible: VisiblePairs
    work: dict[Direction, np.ndarray]
    elements: dict[Direction, np.ndarray]
    peak_slots: dict[Direction, int]

    @property
    def pairs(self) -> int:
        """Visible (row, key) pairs of one query head."""
        return int(self.work["forward"].sum()) // self.plan.heads[0]

    @property
    def pairs_by_rank(self) -> list[int]:
        return [pairs // self.plan.heads[0] for pairs in self.work["forward"].sum(1).tolist()]

    @property
    def imbalance(self) -> float:
        return balance.imbalance(self.work["forward"])

    @property
    def stage_imbalance(self) -> float:
        return balance.stage_imbalance(self.work["forward"])

    @property
    def links(self) -> tuple[str, ...]:
        """The communicators that the plan uses."""
        return tuple(sorted({link for d in DIRECTIONS for link in self.plan.schedule(d).move_columns.links}))

    def moves(self, direction: Direction, link: str) -> int:
        """How many moves go over one link."""
        columns = self.plan.schedule(direction).move_columns
        return int((columns.link == columns.links.index(link)).sum()) if link in columns.links else 0

    def bytes_by_stage(
        self, direction: Direction, itemsize: int, accumulation_itemsize: int, link: str | None = None
    ) -> np.ndarray:
        """Bytes sent, over one link or all, `[world, stages]`, at the stages in which they leave.

        For operands of `itemsize` bytes, and the head dim and batch that `verify` was given.
        """
        schedule = self.plan.schedule(direction)
        moves = schedule.move_columns
        size = self.elements[direction] @ np.array([itemsize, accumulation_itemsize], np.int64)
        if link is not None:
            size = size * (moves.link == (moves.links.index(link) if link in moves.links else -1))
        sent = np.zeros((self.plan.world, schedule.stages), np.int64)
        np.add.at(*cells(sent, moves.src, moves.start), size)
        return sent

    def bytes_sent(
        self, direction: Direction, itemsize: int, accumulation_itemsize: int, link: str | None = None
    ) -> list[int]:
        """By rank; see `bytes_by_stage`."""
        sent: list[int] = self.bytes_by_stage(direction, itemsize, accumulation_itemsize, link).sum(1).tolist()
        return sent
