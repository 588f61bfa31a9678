"""`farspan plan`: who computes what and sends what, from the configuration alone."""

from __future__ import annotations

from collections.abc import Callable

from farspan.kernels import masks
from farspan.parallel import orders, plans
from farspan.parallel.degrees import Degrees, MeshError
from farspan.parallel.verify import verify
from farspan.trainer.config import ConfigError, RunConfig


def describe_plan(config: RunConfig, processes: int, report: Callable[[str], None]) -> None:
    """Mesh, plan and verification for one row of plain causal attention. ConfigError for an impossible mesh."""
    parallel, train, model = config.parallel, config.train, config.model
    try:
        degrees = Degrees.divide(processes, parallel.context, parallel.tensor)
    except MeshError as error:
        raise ConfigError(str(error)) from error
    heads = (model.heads // parallel.tensor, model.kv_heads // parallel.tensor)
    order = orders.build(parallel.order, train.sequence_length, parallel.context, parallel.stripe)
    mask = masks.causal(train.sequence_length)
    plan = plans.build(parallel.plan, order, mask, heads)
    found = verify(plan, order, mask, head_dim=model.head_dim, batch=train.micro_batch_rows)
    item = 2 if train.dtype == "bf16" else 4
    report(f"mesh          {degrees.world} processes = {degrees}")
    report(
        f"sequence      {order.length:,} tokens in {order.name} order, {order.slots:,} slots a rank"
        f" ({order.slots * order.world - order.length:,} padding)"
    )
    report(
        f"plan          {plan.name}: {heads[0]} query and {heads[1]} kv heads a rank, {len(plan.blocks)} blocks, "
        f"{plan.forward.stages} stages forward, {plan.backward.stages} backward, digest {plan.digest()}"
    )
    report(
        f"attention     {found.pairs:,} visible pairs a head; the busiest rank has {found.imbalance:.3f} of the mean, "
        f"{found.stage_imbalance:.3f} when ranks wait for each other at every stage"
    )
    for direction in ("forward", "backward"):
        sent = [count / 1e6 for count in found.bytes_sent(direction, item, 4)]
        peak = found.peak_slots[direction] * 2 * model.head_dim * item * train.micro_batch_rows / 1e6
        report(
            f"{direction:<13} each layer sends {max(sent):,.3f} MB from the busiest rank, {sum(sent):,.3f} MB in all; "
            f"a rank holds {peak:,.3f} MB of foreign keys and values at once"
        )
    report("verified      every pair once, operands in place, every result home")
