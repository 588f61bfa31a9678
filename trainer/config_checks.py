"""What sections of a configuration must be to each other; a ValueError is one line that names the key to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from farspan.data.curriculum import ODDS
from farspan.kernels import BACKENDS
from farspan.parallel.cluster import load_cluster
from farspan.parallel.orders import ORDERS
from farspan.parallel.plans import PLANS
from farspan.trainer.attention_checks import check_sparse, check_star, check_window
from farspan.trainer.data_config import StageSection
from farspan.trainer.section import did_you_mean

if TYPE_CHECKING:
    from farspan.trainer.config import RunConfig


def _check_choices(config: RunConfig) -> None:
    for key, value, choices in (
        ("parallel.plan", config.parallel.plan, [*PLANS, "auto"]),
        ("parallel.order", config.parallel.order, [*ORDERS, "two_class"]),
        ("attention.backend", config.attention.backend, list(BACKENDS)),
    ):
        if value not in choices:
            hint = did_you_mean(value, choices) or ";"
            raise ValueError(f"{key} is {value!r}{hint} possible are {', '.join(choices)}")
    if config.parallel.plan == "single" and config.parallel.context > 1:
        raise ValueError(
            f"parallel.plan single keeps a sequence on one rank, but parallel.context is {config.parallel.context}; "
            "set parallel.plan to ring or all_gather"
        )
    if config.parallel.plan not in ("single", "auto"):
        config.parallel.topology.degrees(config.parallel.plan, config.parallel.context)
    for key, users in (("inner", ["hierarchical_ring", "usp"]), ("ulysses", ["usp"])):
        if getattr(config.parallel, key) is not None and config.parallel.plan not in (*users, "auto"):
            raise ValueError(
                f"parallel.{key} {getattr(config.parallel, key)} does nothing with parallel.plan "
                f"{config.parallel.plan}; leave it out, or set parallel.plan to {' or '.join(users)}"
            )
    if config.train.dtype == "bf16" and config.parallel.zero_stage == 0:
        raise ValueError(
            "train.dtype bf16 needs parallel.zero_stage 1 or more (DeepSpeed's bf16 optimizer takes a step that "
            "nobody asked for at stage 0); set parallel.zero_stage to 1 or train.dtype to fp32"
        )
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        raise ValueError("parallel.sequence_parallel divides tokens over tensor ranks, but parallel.tensor is 1")
    config.model.check_tensor_degree(config.parallel.tensor)
    load_cluster(config.cluster)


def _check_rows(config: RunConfig) -> None:
    data, window = config.data, config.data.growing_window
    if data.overlong != "split" and data.method in ("concat", "decompose"):
        raise ValueError(
            f"data.overlong {data.overlong} does nothing with data.method {data.method}, which cuts documents "
            "anyway; leave it out, or set data.method to best_fit or padded"
        )
    if window is None:
        return
    for key, given in (
        ("data.method decompose", data.method == "decompose"),
        ("attention.star", config.attention.star is not None),
        ("attention.across_documents", config.attention.across_documents),
    ):
        if given:
            raise ValueError(
                f"data.growing_window divides rows as documents do, which does not go with {key}; leave one out"
            )
    if window.start >= config.train.sequence_length:
        raise ValueError(
            f"data.growing_window.start {window.start} is not less than train.sequence_length "
            f"{config.train.sequence_length}, so that nothing grows; lower it"
        )


def _check_decompose(config: RunConfig) -> None:
    data, train, curriculum = config.data, config.train, config.curriculum
    if data.method != "decompose":
        for key, given in (("data.decompose", data.decompose), ("curriculum", curriculum)):
            if given != type(given).model_validate({}):
                raise ValueError(
                    f"{key} does nothing with data.method {data.method}; leave it out, or set data.method to decompose"
                )
        return
    for key, length in (
        ("train.sequence_length", train.sequence_length),
        ("data.decompose.shortest", data.decompose.shortest),
    ):
        if length & (length - 1):
            raise ValueError(
                f"{key} is {length}, but data.method decompose makes rows of powers of two; the nearest are "
                f"{1 << (length.bit_length() - 1)} and {1 << length.bit_length()}"
            )
    if data.decompose.shortest > train.sequence_length:
        raise ValueError(
            f"data.decompose.shortest {data.decompose.shortest} is more than train.sequence_length "
            f"{train.sequence_length}, which the longest rows have; lower it"
        )
    if isinstance(curriculum.odds, str) and curriculum.odds not in ODDS:
        hint = did_you_mean(curriculum.odds, list(ODDS)) or ";"
        raise ValueError(
            f"curriculum.odds is {curriculum.odds!r}{hint} possible are {', '.join(ODDS)} or a list of numbers"
        )
    buckets = len(config.row_lengths)
    for key, numbers in (("odds", curriculum.odds), ("mixture", curriculum.mixture)):
        if isinstance(numbers, list) and len(numbers) != buckets:
            raise ValueError(
                f"curriculum.{key} has {len(numbers)} numbers, but there are {buckets} lengths of rows, from "
                f"data.decompose.shortest {data.decompose.shortest} to train.sequence_length "
                f"{train.sequence_length}; give one for each"
            )
    if train.steps % curriculum.cycles:
        raise ValueError(
            f"curriculum.cycles {curriculum.cycles} does not divide train.steps {train.steps}; the nearest that "
            f"goes is {max(1, round(train.steps / curriculum.cycles)) * curriculum.cycles}"
        )
    if data.blend is not None:
        _check_stages_of_cycles(config, data.blend.stages)
    if config.memory.keep_layers == "auto":
        raise ValueError(
            "memory.keep_layers auto measures the first steps, and data.method decompose makes the later ones "
            "unlike them; set memory.keep_layers to a number"
        )
    sparse = config.attention.sparse
    if sparse is not None and (sparse.refresh > 1 or sparse.budgets is not None):
        key = "refresh" if sparse.refresh > 1 else "budgets"
        raise ValueError(
            f"attention.sparse.{key} is for rows of one length, and data.method decompose makes rows of several; "
            "leave it out"
        )


def _check_stages_of_cycles(config: RunConfig, stages: Sequence[StageSection]) -> None:
    cycle = config.cycle_steps
    for number, stage in enumerate(stages[:-1]):
        if stage.steps is not None and stage.steps % cycle:
            raise ValueError(
                f"data.blend.stages.{number}.steps {stage.steps} ends inside a cycle, and each of the "
                f"curriculum.cycles {config.curriculum.cycles} has {cycle} steps of train.steps; set it to a "
                f"multiple of these, such as {max(1, round(stage.steps / cycle)) * cycle}"
            )


def _check_end_of_stages(config: RunConfig) -> None:
    stages = [] if config.data.blend is None else config.data.blend.stages
    if stages and stages[-1].steps is not None:
        done = sum(stage.steps or 0 for stage in stages)
        if done < config.train.steps:
            raise ValueError(
                f"data.blend.stages end after step {done}, and train.steps is {config.train.steps}; leave out the "
                "steps of the last one"
            )


def _check_tokens_per_rank(config: RunConfig) -> None:
    context, held = config.parallel.context, config.parallel.tokens_per_rank
    if held is None:
        return
    if context & (context - 1):
        raise ValueError(
            f"parallel.context is {context}, but with parallel.tokens_per_rank rows are shared by a power of two "
            f"of ranks; set it to {1 << (context.bit_length() - 1)} or {1 << context.bit_length()}"
        )
    if -(-config.train.sequence_length // context) > held:
        raise ValueError(
            f"train.sequence_length {config.train.sequence_length} over parallel.context {context} is more than "
            f"parallel.tokens_per_rank {held}; raise one of the latter two"
        )


def _check_memory(config: RunConfig) -> None:
    memory, layers = config.memory, config.model.layers
    if memory.offload and memory.recompute == "none":
        raise ValueError(
            "memory.offload moves what recomputation starts from, but memory.recompute is none; "
            "set memory.recompute to selective or full"
        )
    if memory.keep_layers and memory.recompute == "none":
        raise ValueError(
            f"memory.keep_layers {memory.keep_layers} spares layers from recomputation, but memory.recompute is "
            "none, which spares all; set memory.keep_layers to 0"
        )
    if memory.keep_layers_at_first > layers:
        raise ValueError(f"memory.keep_layers {memory.keep_layers} is more than model.layers {layers}; lower it")


CHECKS = (
    _check_choices,
    _check_rows,
    _check_decompose,
    _check_end_of_stages,
    _check_tokens_per_rank,
    check_star,
    check_window,
    check_sparse,
    _check_memory,
)
