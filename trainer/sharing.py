"""How the ranks share rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farspan.data.rows import Row
from farspan.data.visibility import Visibility
from farspan.parallel.mesh import Mesh
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import RunConfig
from farspan.trainer.plan_choice import NamedPlan, plan_names
from farspan.trainer.row_length import context_of, for_rows


@dataclass(frozen=True, eq=False)
class Sharing:
    """`config` is as rows of this length see it, and `mesh` has their context degree."""

    config: RunConfig
    mesh: Mesh
    arrangement: Arrangement
    plans: dict[Visibility, NamedPlan]

    @classmethod
    def of(cls, config: RunConfig, mesh: Mesh, length: int, rows: Sequence[Row] = ()) -> Sharing:
        """`parallel.plan: auto` is judged by `rows`, or by rows of one document each when none are given."""
        context = context_of(config, length)
        config = for_rows(config, length)
        arrangement = Arrangement(config, context)
        return cls(config, mesh.with_context(context), arrangement, plan_names(config, arrangement, rows))

    @property
    def length(self) -> int:
        return self.config.train.sequence_length

    @property
    def micro_batch_rows(self) -> int:
        return self.config.train.micro_batch_rows
