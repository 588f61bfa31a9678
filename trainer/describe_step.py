"""The time and the memory of an optimizer step, in words."""

from __future__ import annotations

from collections.abc import Callable

from farspan.kernels import rates
from farspan.parallel.cost import NoRatesError
from farspan.parallel.plan import Direction
from farspan.parallel.timeline import Timeline
from farspan.trainer.memory_estimate import estimate_memory, remedies
from farspan.trainer.plan_choice import predict_attention
from farspan.trainer.planned import LayerPlan, Planned
from farspan.trainer.step_estimate import StepEstimate, estimate_step

Say = Callable[[str, str], None]


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
    try:
        step, timelines = predict_step(planned)
    except NoRatesError as error:
        say("step", f"no time predicted: {error}")
        return
    table = rates.of_capability(cluster.compute_capability)
    for layer, lines in timelines.items():
        say(
            "layer",
            ("attention" if len(timelines) == 1 else f"attention to {layer.seen.in_words}")
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


def predict_step(planned: Planned) -> tuple[StepEstimate, dict[LayerPlan, dict[Direction, Timeline]]]:
    """With the attention of one layer of each kind; NoRatesError where nothing was measured to predict it by."""
    config, cluster = planned.config, planned.cluster
    timelines = {
        layer: predict_attention(config, cluster, layer.plan, planned.order, layer.found.visible, layer.found.elements)
        for layer in planned.kinds
    }
    tokens = planned.order.slots * config.train.micro_batch_rows
    attention = [timelines[layer] for layer in planned.layers]
    return estimate_step(config, planned.degrees, cluster, attention, tokens), timelines


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
            seconds = predict_step(planned)[0].total
        except NoRatesError:  # said of the longest rows
            pass
        else:
            text += f"; a step of {seconds:,.3f} s expected, {train.tokens_per_step / seconds:,.0f} tokens/s"
    say("rows", text)


def say_memory(planned: Planned, say: Say) -> None:
    config, cluster, degrees = planned.config, planned.cluster, planned.degrees
    plan_bytes = max(_plan_bytes(planned, layer) for layer in planned.kinds)
    memory = estimate_memory(config, degrees, plan_bytes)
    available = int(cluster.memory_gib * 2**30)

    def gib(bytes_: int) -> str:
        return f"{bytes_ / 2**30:.2f}"

    say("memory", f"{gib(memory.total)} of {cluster.memory_gib:.1f} GiB of a GPU, when it is fullest ({memory.moment})")
    engine = f", DeepSpeed's buffers {gib(memory.engine)}" if memory.engine else ""
    say(
        "",
        f"weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, optimizer {gib(memory.optimizer)}{engine}; "
        f"kept by layers {gib(memory.kept)}, {memory.moment} {gib(memory.working)} (of other ranks and on the way "
        f"{gib(plan_bytes)}); beside tensors {gib(memory.beside)}",
    )
    if memory.total > available:
        changes = list(remedies(config, degrees, plan_bytes, available))
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
