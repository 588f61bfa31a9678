"""Plans made and verified from the configuration alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from farspan.data.visibility import Visibility
from farspan.parallel.cluster import Cluster, load_cluster
from farspan.parallel.degrees import Degrees, MeshError
from farspan.parallel.orders import Order
from farspan.parallel.plan import Plan
from farspan.parallel.report import Report
from farspan.parallel.verify import verify
from farspan.trainer.arrangement import Arrangement, check_tiles
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.deepspeed_config import engine_config
from farspan.trainer.expected_work import ExpectedWork, expected_work
from farspan.trainer.first_rows import first_rows
from farspan.trainer.plan_choice import build_plan, plan_names
from farspan.trainer.row_length import degrees_for_rows, for_rows


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The plan of all layers whose tokens see alike, and what `verify` found."""

    seen: Visibility
    plan: Plan
    found: Report


@dataclass(frozen=True, eq=False)
class Planned:
    """What `farspan plan` describes. `layers` has the plan of each layer; those that see alike share theirs.

    `work` is what layers that select are expected to compute; None where none does.
    """

    config: RunConfig
    cluster: Cluster
    degrees: Degrees
    order: Order
    layers: tuple[LayerPlan, ...]
    work: ExpectedWork | None

    @property
    def densities(self) -> list[float]:
        """The share of what its mask shows that each layer is expected to compute."""
        sparse, count = self.config.attention.sparse, len(self.layers)
        if self.work is None or sparse is None:
            return [1.0] * count
        selecting = sparse.layers(count, self.config.attention.window)
        return [self.work.density if layer in selecting else 1.0 for layer in range(count)]

    @property
    def kinds(self) -> dict[LayerPlan, int]:
        """The plans, each with the number of its layers."""
        return Counter(self.layers)

    @property
    def itemsize(self) -> int:
        return 2 if self.config.train.dtype == "bf16" else 4


def plan_of(config: RunConfig, processes: int, length: int) -> tuple[Planned, list[str]]:
    """For rows of so many tokens, of one document; with the reasons where `parallel.plan` is `auto`.

    ConfigError for an impossible mesh, or where the deepspeed section contradicts other keys.
    """
    parallel, model = config.parallel, config.model
    if model.vocabulary_size is None:
        model = model.model_copy(update={"vocabulary_size": config.data.vocabulary_size})
        config = config.model_copy(update={"model": model})
    try:
        degrees = Degrees.divide(processes, parallel.context, parallel.tensor)
    except MeshError as error:
        raise ConfigError(str(error)) from error
    engine_config(config, degrees)
    config, degrees = for_rows(config, length), degrees_for_rows(config, degrees, length)
    arrangement = Arrangement(config, degrees.context)
    order = arrangement.order()
    check_tiles(config, order)
    first, words = first_rows(config) if parallel.plan == "auto" else ([], "")
    named = plan_names(config, arrangement, first)
    made: dict[Visibility, LayerPlan] = {}
    for seen, mask in arrangement.masks().items():
        plan = build_plan(config, named[seen].name, order, mask)
        found = verify(plan, order, mask, head_dim=model.head_dim, batch=config.train.micro_batch_rows)
        made[seen] = LayerPlan(seen, plan, found)
    layers = tuple(made[seen] for seen in arrangement.layers)
    reasons = [f"{chosen.reason}; judged by {words}" for chosen in named.values() if chosen.reason]
    return Planned(config, load_cluster(config.cluster), degrees, order, layers, expected_work(config)), reasons
