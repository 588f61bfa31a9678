"""A plan made and verified from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.parallel.cluster import Cluster, load_cluster
from farspan.parallel.degrees import Degrees, MeshError
from farspan.parallel.orders import Order
from farspan.parallel.plan import Plan
from farspan.parallel.report import Report
from farspan.parallel.verify import verify
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.first_rows import first_rows
from farspan.trainer.plan_choice import build_plan, plan_name


@dataclass(frozen=True, eq=False)
class Planned:
    """What `farspan plan` describes."""

    config: RunConfig
    cluster: Cluster
    degrees: Degrees
    order: Order
    plan: Plan
    found: Report

    @property
    def itemsize(self) -> int:
        return 2 if self.config.train.dtype == "bf16" else 4


def plan_of(config: RunConfig, processes: int) -> tuple[Planned, str | None]:
    """For rows of one document; with the reason where `parallel.plan` is `auto`.

    ConfigError for an impossible mesh.
    """
    parallel, train = config.parallel, config.train
    model = config.model
    if model.vocabulary_size is None:
        model = model.model_copy(update={"vocabulary_size": config.data.vocabulary_size})
        config = config.model_copy(update={"model": model})
    try:
        degrees = Degrees.divide(processes, parallel.context, parallel.tensor)
    except MeshError as error:
        raise ConfigError(str(error)) from error
    arrangement = Arrangement(config, degrees.context)
    order, mask = arrangement.order(), arrangement.mask()
    first, words = first_rows(config, degrees.data) if parallel.plan == "auto" else ([], "")
    name, reason = plan_name(config, arrangement.order(first), lambda: arrangement.mask(first))
    plan = build_plan(config, name, order, mask)
    found = verify(plan, order, mask, head_dim=model.head_dim, batch=train.micro_batch_rows)
    return Planned(
        config, load_cluster(config.cluster), degrees, order, plan, found
    ), reason and f"{reason}; judged by {words}"
