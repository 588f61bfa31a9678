"""The time and the memory of an optimizer step, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from farspan.kernels import rates
from farspan.parallel.cost import NoRatesError
from farspan.parallel.plan import Direction
from farspan.parallel.timeline import Timeline
from farspan.trainer.memory_estimate import estimate_memory, remedies
from farspan.trainer.plan_choice import predict_attention
from farspan.trainer.planned import LayerPlan, Planned
from farspan.trainer.sparse_memory import selection_bytes
from farspan.trainer.step_estimate import StepEstimate, estimate_step

Say = Callable[[str, str], None]
# Of one layer of each kind, by the share of what its mask shows that it computes.
Attention = Mapping[tuple[LayerPlan, float], Mapping[Direction, Timeline]]


def say_time(planned: Planned, say: Say) -> None:
    cluster, train = planned.cluster, planned.config.train
    at_once = planned.degrees.data * train.micro_batch_rows
    if train.rows_per_step % at_once:
        say(
            "step",
            f"no time predicted: data {planned.degrees.data} x train.micro_batch_rows {train.micro_batch_rows} do not "
            f"divide the {train.rows_per_step} rows of a step; the nearest train.tokens_per_step that goes is "
            f"{train.nearest_tokens_per_step(at_once)}",
        )
        return
    if train.dtype != "bf16":
        say("step", "no time predicted: rates were measured in bf16, and train.dtype is fp32")
        return
    densities = planned.densities
    try:
        timelines = _attention(planned)
    except NoRatesError as error:
        say("step", f"no time predicted: {error}")
        return
    step = _estimate(planned, timelines, densities)
    table = rates.of_capability(cluster.compute_capability)
    for (layer, density), lines in timelines.items():
        say(
            "layer",
            ("attention" if density == 1 else f"{100 * density:.3g} % of attention")
            + ("" if len(planned.kinds) == 1 else f" to {layer.seen.in_words}")
            + " in rows of one document: "
            + ", ".join(
                f"{direction} {1e3 * line.seconds:,.2f} ms ({1e3 * line.exposed_seconds:,.2f} waiting)"
                for direction, line in lines.items()
            )
            + f", by the rates of {table.device}",
        )
    say(
        "step",
        f"{step.total:,.3f} s expected, {train.tokens_per_step / step.total:,.0f} tokens/s: {step.compute:,.3f} s of "
        f"compute and {step.exposed:,.3f} s of exposed communication ({100 * step.exposed / step.total:.1f} %)",
    )
    if planned.work is not None:
        dense = _estimate(planned, timelines, [1.0] * len(densities)).total
        say(
            "",
            f"with dense attention in all layers {dense:,.3f} s: selecting makes a step {dense / step.total:.2f} times "
            "as fast, but for the time that it takes itself, which is not predicted",
        )
    say(
        "",
        f"compute: attention {step.attention:,.3f}, linear layers {step.linear:,.3f}, loss {step.loss:,.3f}, "
        f"element-wise {step.elementwise:,.3f}, optimizer {step.optimizer:,.3f}",
    )
    say(
        "",
        f"exposed: attention {step.waiting:,.3f}, tensor parallelism {step.tensor:,.3f}, gradients and weights "
        f"{step.reduction:,.3f}",
    )


def _attention(planned: Planned) -> Attention:
    """NoRatesError where nothing was measured to predict it by."""
    return {
        (layer, density): predict_attention(
            planned.config,
            planned.cluster,
            layer.plan,
            planned.order,
            layer.found.visible,
            layer.found.elements,
            density,
        )
        for layer in planned.kinds
        for density in dict.fromkeys((1.0, *planned.densities))
        if density == 1 or not layer.seen.window
    }


def _estimate(planned: Planned, attention: Attention, densities: Sequence[float]) -> StepEstimate:
    """A step whose layers compute these shares of what their masks show."""
    lines = [attention[layer, density] for layer, density in zip(planned.layers, densities)]
    tokens = planned.order.slots * planned.config.train.micro_batch_rows
    return estimate_step(planned.config, planned.degrees, planned.cluster, lines, tokens)


def say_length(planned: Planned, say: Say) -> None:
    """One line on rows that are shorter than the longest, where `farspan plan` says everything of these."""
    order, degrees, train = planned.order, planned.degrees, planned.config.train
    names = " and ".join(dict.fromkeys(layer.plan.name for layer in planned.layers))
    text = (
        f"{order.length:,} tokens: data {degrees.data} x context {degrees.context}, {train.micro_batch_rows:,} "
        f"row{'' if train.micro_batch_rows == 1 else 's'} in a micro-batch, {names}, verified"
    )
    if train.dtype == "bf16" and train.rows_per_step % (degrees.data * train.micro_batch_rows) == 0:
        try:
            seconds = _estimate(planned, _attention(planned), planned.densities).total
        except NoRatesError:  # said of the longest rows
            pass
        else:
            text += f"; a step of {seconds:,.3f} s expected, {train.tokens_per_step / seconds:,.0f} tokens/s"
    say("rows", text)


def say_memory(planned: Planned, say: Say) -> None:
    config, cluster, degrees = planned.config, planned.cluster, planned.degrees
    plan_bytes = max(_plan_bytes(planned, layer) for layer in planned.kinds)
    selection = max((_selection_bytes(planned, layer) for layer in planned.kinds), default=0)
    memory = estimate_memory(config, degrees, plan_bytes, selection)
    available = int(cluster.memory_gib * 2**30)

    def gib(bytes_: int) -> str:
        return f"{bytes_ / 2**30:.2f}"

    say("memory", f"{gib(memory.total)} of {cluster.memory_gib:.1f} GiB of a GPU, when it is fullest ({memory.moment})")
    engine = f", DeepSpeed's buffers {gib(memory.engine)}" if memory.engine else ""
    say(
        "",
        f"weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, optimizer {gib(memory.optimizer)}{engine}; "
        f"kept by layers {gib(memory.kept)}, {memory.moment} {gib(memory.working)} (of other ranks and on the way "
        f"{gib(plan_bytes)}{f', lists of selected tiles {gib(selection)}' if selection else ''}); beside tensors "
        f"{gib(memory.beside)}",
    )
    if memory.total > available:
        changes = list(remedies(config, degrees, plan_bytes, available, selection))
        advice = (
            f"set {', or '.join(changes)}"
            if changes
            else (
                "no single change is enough: raise parallel.context, parallel.tensor and parallel.zero_stage together"
            )
        )
        say("does not fit", f"by {(memory.total - available) / 2**30:.1f} GiB: {advice}")


def _plan_bytes(planned: Planned, layer: LayerPlan) -> int:
    """Keys and values of other ranks, and what is on its way to and from a rank at the busiest stage."""
    found, train = layer.found, planned.config.train
    slot = 2 * planned.config.model.head_dim * planned.itemsize * train.micro_batch_rows
    sent = found.bytes_by_stage("backward", planned.itemsize, 4)
    return found.peak_slots["backward"] * slot + 2 * int(sent.max(initial=0))


def _selection_bytes(planned: Planned, layer: LayerPlan) -> int:
    if planned.work is None or layer.seen.window:
        return 0
    return selection_bytes(planned.config, layer.plan, layer.found.visible, planned.work.columns)
