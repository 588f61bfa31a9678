"""`farspan plan`: who computes and sends what, how long it takes and what it needs, from the configuration alone."""

from __future__ import annotations

import gc
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from farspan.parallel import balance
from farspan.parallel.plan import DIRECTIONS
from farspan.trainer.config import RunConfig
from farspan.trainer.describe_step import Say, say_length, say_memory, say_time
from farspan.trainer.plan_table import by_rank
from farspan.trainer.planned import LayerPlan, Planned, plan_of

_WIDTH, _INDENT = 100, 14


def describe_plan(config: RunConfig, processes: int, report: Callable[[str], None], plot: Path | None = None) -> None:
    """For rows of one document: mesh, plan, verification, work and bytes, time and memory of a step of the longest,
    and a line on each other length.

    ConfigError for an impossible mesh, or when `plot` is given and cannot be drawn.
    """
    # A thousand ranks make millions of moves and pieces, and to look for cycles among them takes half of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        _describe(config, processes, report, plot)
    finally:
        if collecting:
            gc.enable()


def _describe(config: RunConfig, processes: int, report: Callable[[str], None], plot: Path | None) -> None:
    def say(subject: str, text: str) -> None:
        begin = " " * _INDENT
        for line in textwrap.wrap(text, _WIDTH, initial_indent=f"{subject:<{_INDENT}}", subsequent_indent=begin):
            report(line)

    if plot is not None:
        from farspan.trainer.plan_plot import check_plot, plot_work

        check_plot(plot)
    planned, reasons = plan_of(config, processes, config.train.sequence_length)
    shorter = [plan_of(config, processes, length)[0] for length in config.row_lengths[1:]]
    if plot is not None:  # before anything is printed, for who reads it may leave
        plot_work({layer.seen.in_words: layer.found for layer in planned.kinds}, plot)
    _say_mesh(planned, say)
    if (star := config.attention.star) is not None:
        say("star", star.in_words + (f"; {star.warning}" if star.warning else ""))
    if (sparse := config.attention.sparse) is not None and (work := planned.work) is not None:
        layers = len(sparse.layers(config.model.layers, config.attention.window))
        say(
            "sparse",
            f"{layers} of {config.model.layers} layers select what they compute, {100 * work.density:.3g} % of causal "
            f"attention by {work.source}; times are predicted for that, spread evenly over ranks and stages; work and "
            "bytes are those of dense attention",
        )
    for reason in reasons:
        say("choice", reason)
    for layer, count in planned.kinds.items():
        if len(planned.kinds) > 1 or layer.seen.window:
            say("layers", f"{count} of {len(planned.layers)}, whose tokens see {layer.seen.in_words}:")
        _say_traffic(planned, layer, say)
    say_time(planned, say)
    say_memory(planned, say)
    for others in shorter:
        say_length(others, say)
    say(
        "verified",
        "in both directions: every pair once, operands in place, every result home; sends and receives agree, and no "
        "rank waits in a circle",
    )
    for layer in planned.kinds:
        if len(planned.kinds) > 1:
            report(f"layers whose tokens see {layer.seen.in_words}:")
        if layer.plan.world > 1:
            for line in by_rank(layer.found, planned.itemsize, _WIDTH):
                report(line)
    if plot is not None:
        say("plot", str(plot))


def _say_mesh(planned: Planned, say: Say) -> None:
    order, degrees, cluster = planned.order, planned.degrees, planned.cluster
    nodes = math.ceil(degrees.world / cluster.gpus_per_node)
    say("mesh", f"{degrees.world} processes = {degrees}")
    say(
        "cluster",
        f"{planned.config.cluster}: {nodes} node{'' if nodes == 1 else 's'} of {cluster.gpus_per_node} {cluster.gpu}, "
        f"{cluster.inner.gigabytes_per_second:g} GB/s inside, {cluster.outer.gigabytes_per_second:g} GB/s between them",
    )
    say(
        "sequence",
        f"{order.length:,} tokens in {order.name} order, {order.slots:,} slots a rank"
        f" ({order.slots * order.world - order.length:,} padding)",
    )


def _say_traffic(planned: Planned, layer: LayerPlan, say: Say) -> None:
    plan, found, train = layer.plan, layer.found, planned.config.train
    say(
        "plan",
        f"{plan.name}: {plan.heads[0]} query and {plan.heads[1]} kv heads a rank, {len(plan.blocks):,} blocks, "
        f"{plan.forward.stages:,} stages forward, {plan.backward.stages:,} backward, digest {plan.digest()}",
    )
    say(
        "attention",
        f"{found.pairs:,} visible pairs a head; the busiest rank has {found.imbalance:.3f} of the mean, "
        f"{found.stage_imbalance:.3f} when ranks wait for each other at every stage",
    )
    per_node = planned.cluster.network(planned.degrees.tensor).ranks_per_node
    for direction in DIRECTIONS:
        sent = [count / 1e6 for count in found.bytes_sent(direction, planned.itemsize, 4)]
        slot = 2 * planned.config.model.head_dim * planned.itemsize * train.micro_batch_rows
        text = (
            f"each layer sends {max(sent):,.3f} MB from the busiest rank, {sum(sent):,.3f} MB in all; "
            f"a rank holds {found.peak_slots[direction] * slot / 1e6:,.3f} MB of foreign keys and values at once"
        )
        links = [
            f"{link} {sum(found.bytes_sent(direction, planned.itemsize, 4, link)) / 1e6:,.3f} MB in "
            f"{found.moves(direction, link):,} moves"
            for link in found.links
        ]
        if len(links) > 1:
            text += f"; by link: {', '.join(links)}"
        if plan.world > per_node:
            times = balance.crossings(plan, direction, per_node)
            text += f"; what other nodes need enters each of them {'once' if times <= 1 else f'up to {times} times'}"
        say(direction, text)
