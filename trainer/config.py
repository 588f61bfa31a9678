"""The configuration: one YAML file, `key=value` overrides, and what can be checked in them alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from farspan.data.curriculum import ODDS
from farspan.kernels import BACKENDS
from farspan.kernels.tiles import TILE
from farspan.models.config import ModelConfig, RecomputeMode
from farspan.parallel.cluster import load_cluster
from farspan.parallel.orders import ORDERS
from farspan.parallel.plans import PLANS, Topology
from farspan.trainer.attention_config import AttentionSection
from farspan.trainer.data_config import CurriculumSection, DataSection, StageSection
from farspan.trainer.section import Section, did_you_mean

# Plans whose blocks begin and end with any token, and not with tiles.
CUT_ANYWHERE = ("group_cast", "star")
# Plans in which keys and values travel, and queries do not.
KEYS_TRAVEL = ("ring", "hierarchical_ring", "all_gather")


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key to change."""


class RunSection(Section):
    dir: Path
    """Folder of this run: resolved configuration, metrics, TensorBoard files, logs and checkpoints."""
    weights_from: Path | None = None
    """A run's folder: training begins with the weights of its newest checkpoint, and with a new optimizer. The model
    must be the same but for `model.rotary_theta`, which longer rows want higher."""
    seed: int = Field(0, ge=0)
    """Initial weights, the order of samples and every other draw come from this number."""


class LaunchSection(Section):
    processes: int | None = Field(None, gt=0)
    """Worker processes on this machine; one a GPU when not given, or one where there is no GPU."""
    stop_seconds: float = Field(1800, gt=0)
    """How long workers may take to finish their step and save after SIGTERM or SIGINT."""


class TrainSection(Section):
    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    tokens_per_step: int = Field(gt=0)
    """Tokens of one optimizer step, over all ranks and micro-batches: a multiple of `sequence_length`."""
    sequence_length: int = Field(gt=1)
    """Tokens of one row; of the longest, where lengths differ."""
    micro_batch_rows: int = Field(1, gt=0)
    """Rows that one forward pass of a data rank takes; of shorter ones it takes more, up to as many tokens a rank."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of weights in the forward and backward passes; optimizer state is fp32 always."""
    loss_chunk_tokens: int = Field(8192, gt=0)
    """Tokens whose logits exist at once; larger chunks are hardly faster, smaller ones save memory."""
    report_every: int = Field(20, gt=0)
    """Steps between reports of the loss by length of documents and by position in them; evaluations always report."""

    @model_validator(mode="after")
    def _check_rows(self) -> TrainSection:
        if self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"train.tokens_per_step {self.tokens_per_step} must be a multiple of train.sequence_length "
                f"{self.sequence_length}; the nearest is {self.nearest_tokens_per_step(1)}"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_length

    def nearest_tokens_per_step(self, rows: int) -> int:
        """Tokens of the nearest multiple of so many rows."""
        unit = rows * self.sequence_length
        return max(1, round(self.tokens_per_step / unit)) * unit


class ParallelSection(Section):
    context: int = Field(1, gt=0)
    """Ranks that share every sequence."""
    tokens_per_rank: int | None = Field(None, gt=0)
    """Tokens of a row that one rank can hold. Rows are then shared by as few ranks as hold them, `context` at most, and
    so by fewer the shorter they are; when not given, all rows are shared by `context` ranks."""
    tensor: int = Field(1, gt=0)
    """Ranks that share every layer."""
    sequence_parallel: bool = False
    """Divide tokens over the tensor ranks outside attention and feed-forward; needs CUDA."""
    inner: int | None = Field(None, gt=0)
    """Ranks of an inner ring, such as those of a node over `ulysses`: for plans hierarchical_ring and usp."""
    ulysses: int | None = Field(None, gt=0)
    """Ranks that exchange heads, the nearest ones: for plan usp."""
    gradient_wire: Literal["fp32", "bf16"] = "fp32"
    """What partial gradients of keys and values travel in; bf16 halves these bytes and rounds at every hop."""
    sparse_wire: bool = False
    """Send only keys and values, and gradients of them, that `attention.sparse` selects for some rank on their way."""
    plan: str = "ring"
    """How attention over a shared sequence is carried out; `auto` is what the time model expects to be the fastest on
    `cluster`, for the first rows of the text."""
    order: str = "zigzag"
    """Which tokens of a sequence each rank holds; `two_class` is that of plan star, by the global parts of its rows."""
    stripe: int = Field(128, gt=0)
    """Tokens of one stripe of the striped order."""
    zero_stage: int = Field(1, ge=0, le=3)
    """What DeepSpeed shards over data x context ranks: nothing, optimizer state, also gradients, also weights."""
    timeout_seconds: float = Field(1800, ge=1)
    """How late a rank may be, through a slow step, compilation or a checkpoint, before the others give up and end."""

    @property
    def topology(self) -> Topology:
        return Topology(self.inner, self.ulysses)


class MemorySection(Section):
    recompute: RecomputeMode = "selective"
    """What the backward pass computes again: `none`, or whole layers from their input (`full`), or all of a layer but
    attention, whose results are kept as the layer's input is (`selective`). Gradients are the same in every bit."""
    offload: bool = False
    """Move what is kept to pinned host memory and back, beside the computation; needs CUDA and recomputation."""
    keep_layers: int | Literal["auto"] = 0
    """How many layers, the last ones, keep everything, as with `recompute: none`: as many as memory is left for. `auto`
    begins with one, and raises the number after the first steps as far as 5 % of the GPU's memory stay free."""

    @field_validator("keep_layers", mode="before")
    @classmethod
    def _check_keep_layers(cls, given: object) -> object:
        if given != "auto" and (type(given) is not int or given < 0):
            raise ValueError(f"memory.keep_layers is {given!r}; it must be a number of layers, or auto")
        return given

    @property
    def keep_layers_at_first(self) -> int:
        return 1 if self.keep_layers == "auto" else self.keep_layers


class OptimizerSection(Section):
    learning_rate: float = Field(3e-4, gt=0)
    """Highest learning rate of the schedule."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: a half cosine, no change, or no change and then a linear decay (warm-up, stable, decay)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step over the highest, for cosine and wsd."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which wsd decays."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's averaging of gradients and of their squares."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to AdamW's denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, on matrices only."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Norm to which the gradient is clipped; 0 for no clipping."""


class EvalSection(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations on held-out text; 0 for none but the last, which is always evaluated."""
    rows: int = Field(64, gt=0)
    """Held-out rows of one evaluation, or all where there are fewer."""


class CheckpointSection(Section):
    every: int = Field(500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(3, gt=0)
    """How many checkpoints stay."""


class RunConfig(Section):
    """The whole configuration of a run."""

    run: RunSection
    launch: LaunchSection = LaunchSection()  # type: ignore[call-arg]
    model: ModelConfig
    data: DataSection
    train: TrainSection
    curriculum: CurriculumSection = CurriculumSection()  # type: ignore[call-arg]
    parallel: ParallelSection = ParallelSection()  # type: ignore[call-arg]
    attention: AttentionSection = AttentionSection()
    memory: MemorySection = MemorySection()
    optimizer: OptimizerSection = OptimizerSection()  # type: ignore[call-arg]
    eval: EvalSection = EvalSection()  # type: ignore[call-arg]
    checkpoint: CheckpointSection = CheckpointSection()  # type: ignore[call-arg]
    cluster: str = "h200"
    """The machines, for predictions and for `parallel.plan: auto`: a name in configs/clusters, or a .yaml's path."""
    deepspeed: dict[str, Any] | Path = Field(default_factory=dict)
    """Further keys of a DeepSpeed configuration, inline or as the path of a JSON file; none that is set elsewhere."""

    @model_validator(mode="after")
    def _check_choices(self) -> RunConfig:
        for key, value, choices in (
            ("parallel.plan", self.parallel.plan, [*PLANS, "auto"]),
            ("parallel.order", self.parallel.order, [*ORDERS, "two_class"]),
            ("attention.backend", self.attention.backend, list(BACKENDS)),
        ):
            if value not in choices:
                hint = did_you_mean(value, choices) or ";"
                raise ValueError(f"{key} is {value!r}{hint} possible are {', '.join(choices)}")
        if self.parallel.plan == "single" and self.parallel.context > 1:
            raise ValueError(
                f"parallel.plan single keeps a sequence on one rank, but parallel.context is {self.parallel.context}; "
                "set parallel.plan to ring or all_gather"
            )
        if self.parallel.plan not in ("single", "auto"):
            self.parallel.topology.degrees(self.parallel.plan, self.parallel.context)
        for key, users in (("inner", ["hierarchical_ring", "usp"]), ("ulysses", ["usp"])):
            if getattr(self.parallel, key) is not None and self.parallel.plan not in (*users, "auto"):
                raise ValueError(
                    f"parallel.{key} {getattr(self.parallel, key)} does nothing with parallel.plan "
                    f"{self.parallel.plan}; leave it out, or set parallel.plan to {' or '.join(users)}"
                )
        if self.train.dtype == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "train.dtype bf16 needs parallel.zero_stage 1 or more (DeepSpeed's bf16 optimizer takes a step that "
                "nobody asked for at stage 0); set parallel.zero_stage to 1 or train.dtype to fp32"
            )
        if self.parallel.sequence_parallel and self.parallel.tensor == 1:
            raise ValueError("parallel.sequence_parallel divides tokens over tensor ranks, but parallel.tensor is 1")
        self.model.check_tensor_degree(self.parallel.tensor)
        load_cluster(self.cluster)
        return self

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of the rows that training takes, the longest first."""
        longest = self.train.sequence_length
        if self.data.method != "decompose":
            return (longest,)
        return tuple(longest >> i for i in range((longest // self.data.decompose.shortest).bit_length()))

    @property
    def cycle_steps(self) -> int:
        """Steps of each cycle of the curriculum."""
        return self.train.steps // self.curriculum.cycles

    @model_validator(mode="after")
    def _check_rows(self) -> RunConfig:
        data, window = self.data, self.data.growing_window
        if data.overlong != "split" and data.method in ("concat", "decompose"):
            raise ValueError(
                f"data.overlong {data.overlong} does nothing with data.method {data.method}, which cuts documents "
                "anyway; leave it out, or set data.method to best_fit or padded"
            )
        if window is None:
            return self
        for key, given in (
            ("data.method decompose", data.method == "decompose"),
            ("attention.star", self.attention.star is not None),
            ("attention.across_documents", self.attention.across_documents),
        ):
            if given:
                raise ValueError(
                    f"data.growing_window divides rows as documents do, which does not go with {key}; leave one out"
                )
        if window.start >= self.train.sequence_length:
            raise ValueError(
                f"data.growing_window.start {window.start} is not less than train.sequence_length "
                f"{self.train.sequence_length}, so that nothing grows; lower it"
            )
        return self

    @model_validator(mode="after")
    def _check_decompose(self) -> RunConfig:
        data, train, curriculum = self.data, self.train, self.curriculum
        if data.method != "decompose":
            for key, given in (("data.decompose", data.decompose), ("curriculum", curriculum)):
                if given != type(given).model_validate({}):
                    raise ValueError(
                        f"{key} does nothing with data.method {data.method}; leave it out, or set data.method to "
                        "decompose"
                    )
            return self
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
        buckets = len(self.row_lengths)
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
            self._check_stages_of_cycles(data.blend.stages)
        if self.memory.keep_layers == "auto":
            raise ValueError(
                "memory.keep_layers auto measures the first steps, and data.method decompose makes the later ones "
                "unlike them; set memory.keep_layers to a number"
            )
        sparse = self.attention.sparse
        if sparse is not None and (sparse.refresh > 1 or sparse.budgets is not None):
            key = "refresh" if sparse.refresh > 1 else "budgets"
            raise ValueError(
                f"attention.sparse.{key} is for rows of one length, and data.method decompose makes rows of several; "
                "leave it out"
            )
        return self

    def _check_stages_of_cycles(self, stages: Sequence[StageSection]) -> None:
        cycle = self.cycle_steps
        for number, stage in enumerate(stages[:-1]):
            if stage.steps is not None and stage.steps % cycle:
                raise ValueError(
                    f"data.blend.stages.{number}.steps {stage.steps} ends inside a cycle, and each of the "
                    f"curriculum.cycles {self.curriculum.cycles} has {cycle} steps of train.steps; set it to a "
                    f"multiple of these, such as {max(1, round(stage.steps / cycle)) * cycle}"
                )

    @model_validator(mode="after")
    def _check_end_of_stages(self) -> RunConfig:
        stages = [] if self.data.blend is None else self.data.blend.stages
        if stages and stages[-1].steps is not None:
            done = sum(stage.steps or 0 for stage in stages)
            if done < self.train.steps:
                raise ValueError(
                    f"data.blend.stages end after step {done}, and train.steps is {self.train.steps}; leave out the "
                    "steps of the last one"
                )
        return self

    @model_validator(mode="after")
    def _check_tokens_per_rank(self) -> RunConfig:
        context, held = self.parallel.context, self.parallel.tokens_per_rank
        if held is None:
            return self
        if context & (context - 1):
            raise ValueError(
                f"parallel.context is {context}, but with parallel.tokens_per_rank rows are shared by a power of two "
                f"of ranks; set it to {1 << (context.bit_length() - 1)} or {1 << context.bit_length()}"
            )
        if -(-self.train.sequence_length // context) > held:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} over parallel.context {context} is more than "
                f"parallel.tokens_per_rank {held}; raise one of the latter two"
            )
        return self

    @model_validator(mode="after")
    def _check_star(self) -> RunConfig:
        star, parallel = self.attention.star, self.parallel
        if parallel.plan == "star" and parallel.order != "two_class":
            raise ValueError(
                f"parallel.plan star sends the rows that parallel.order two_class marks, but parallel.order is "
                f"{parallel.order}; set it to two_class"
            )
        if parallel.order == "two_class" and star is None:
            raise ValueError(
                "parallel.order two_class is for the global parts of Star Attention; set attention.star.block, or "
                "parallel.order to zigzag"
            )
        if parallel.order == "two_class" and parallel.sequence_parallel:
            raise ValueError(
                "parallel.order two_class gives ranks shares that change from batch to batch, which "
                "parallel.sequence_parallel cannot divide; set parallel.sequence_parallel to false"
            )
        if star is None:
            return self
        if 2 * star.block > self.train.sequence_length:
            raise ValueError(
                f"attention.star.block {star.block} leaves every document dense, for none has two blocks in rows of "
                f"train.sequence_length {self.train.sequence_length}; lower it to {self.train.sequence_length // 2} "
                "or less"
            )
        if star.mode == "sft" and self.attention.across_documents:
            raise ValueError(
                "attention.star.mode sft goes by document; set attention.across_documents to false, or "
                "attention.star.mode to lm"
            )
        return self

    @model_validator(mode="after")
    def _check_window(self) -> RunConfig:
        window, layers = self.attention.window, self.model.layers
        if window is None:
            return self
        if window.width >= self.train.sequence_length:
            raise ValueError(
                f"attention.window.width {window.width} leaves every layer dense, for it is not less than "
                f"train.sequence_length {self.train.sequence_length}; lower it, or leave out attention.window"
            )
        full = set(window.full_layers)
        if len(full) != len(window.full_layers) or max(full, default=0) >= layers:
            raise ValueError(
                f"attention.window.full_layers {window.full_layers} must be different layers from 0 to {layers - 1} "
                "(model.layers)"
            )
        if len(full) == layers:
            raise ValueError(
                f"attention.window.full_layers names all {layers} layers, so that none has a window; leave some out, "
                "or leave out attention.window"
            )
        if self.attention.star is not None and not full:
            raise ValueError(
                "attention.star is for layers without a window, and attention.window.full_layers names none; name "
                "some, or leave out attention.window"
            )
        return self

    @model_validator(mode="after")
    def _check_sparse(self) -> RunConfig:
        sparse, parallel, layers = self.attention.sparse, self.parallel, self.model.layers
        if sparse is None:
            if parallel.sparse_wire:
                raise ValueError(
                    "parallel.sparse_wire leaves out what attention.sparse does not select, which is not given; set "
                    "parallel.sparse_wire to false, or attention.sparse.mass"
                )
            return self
        if parallel.sparse_wire and parallel.plan not in (*KEYS_TRAVEL, "auto"):
            raise ValueError(
                f"parallel.sparse_wire leaves out keys and values, and parallel.plan {parallel.plan} does not send "
                f"these alone; set parallel.plan to {', '.join(KEYS_TRAVEL[:-1])} or {KEYS_TRAVEL[-1]}, or "
                "parallel.sparse_wire to false"
            )
        if self.attention.star is not None:
            raise ValueError(
                "attention.sparse selects of what dense layers see, and attention.star cuts these into blocks; leave "
                "out one of them"
            )
        if parallel.plan in CUT_ANYWHERE:
            raise ValueError(
                f"parallel.plan {parallel.plan} cuts keys between any two tokens, and attention.sparse selects tiles "
                f"of {TILE}; set parallel.plan to ring, hierarchical_ring, all_gather, ulysses or usp"
            )
        if len(set(sparse.dense_layers)) != len(sparse.dense_layers) or max(sparse.dense_layers, default=0) >= layers:
            raise ValueError(
                f"attention.sparse.dense_layers {sparse.dense_layers} must be different layers from 0 to {layers - 1} "
                "(model.layers)"
            )
        if not sparse.layers(layers, self.attention.window):
            raise ValueError(
                "attention.sparse.dense_layers and attention.window leave no layer for attention.sparse; name fewer, "
                "or leave out attention.sparse"
            )
        if sparse.estimator == "moba" and sparse.top_k * sparse.chunk >= self.train.sequence_length:
            raise ValueError(
                f"attention.sparse.top_k {sparse.top_k} chunks of attention.sparse.chunk {sparse.chunk} tokens are all "
                f"of train.sequence_length {self.train.sequence_length}; lower one of them"
            )
        if sparse.dense_steps and self.memory.keep_layers == "auto":
            raise ValueError(
                "memory.keep_layers auto measures the first steps, and attention.sparse.dense_steps makes these unlike "
                "the later ones; set memory.keep_layers to a number"
            )
        if not (sparse.train or sparse.evaluate):
            raise ValueError(
                "attention.sparse.train and attention.sparse.evaluate are false, so that nothing is sparse; set one to "
                "true, or leave out attention.sparse"
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> RunConfig:
        memory, layers = self.memory, self.model.layers
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
        return self


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """That of a run's folder, as `load_config`."""
    file = run / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{run} is no run directory: it has no config.yaml")
    return load_config(file, overrides)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `section.key=value` overrides (values are YAML).

    ConfigError, in one line, when the file is missing or broken, a key is unknown (with the nearest known one), or a
    value is not possible.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'run:' and 'train:', not {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(path, error)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same object."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not valid YAML") from error
    *sections, last = key.split(".")
    branch: Any = tree
    for section in sections:
        if isinstance(branch, dict) and branch.get(section) is None:
            branch[section] = {}
        branch = branch[section] if isinstance(branch, dict) else None
        if not isinstance(branch, dict):
            raise ConfigError(f"{key} cannot be set: {section} is not a section")
    if value is None and text.strip() and _is_key(sections, last):
        branch.pop(last, None)  # null: as if the key were not there, so that its default counts
    else:
        branch[last] = value


def _is_key(sections: Sequence[str], name: str) -> bool:
    try:
        return name in _section_at(sections).model_fields
    except (KeyError, StopIteration):  # a section that is none, or whose keys are free
        return False


def _one_line(path: Path, error: ValidationError) -> str:
    """All problems in one line, each with its key; unknown keys with the nearest known one."""
    problems: list[str] = []
    for detail in error.errors():
        # Neither a dict nor a path: pydantic tells both, and puts its own words for the two behind the key.
        location = detail["loc"][:1] if detail["loc"][:1] == ("deepspeed",) else detail["loc"]
        key = ".".join(str(part) for part in location)
        if any(problem.startswith(f"{key} is ") for problem in problems):
            continue
        if detail["type"] == "extra_forbidden":
            *section, name = detail["loc"]
            known = list(_section_at(section).model_fields)
            problems.append(f"there is no key {key}{did_you_mean(str(name), known)} (keys there: {', '.join(known)})")
        elif detail["type"] == "missing":
            problems.append(f"{key} is required")
        elif detail["type"] == "value_error":
            problems.append(str(detail["ctx"]["error"]))
        elif detail["type"] == "model_type":
            problems.append(f"{key} is {detail['input']!r}: it must be a section, with keys of its own")
        else:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            problems.append(f"{key} is {detail['input']!r}: {message}")
    return f"{path}: {'; '.join(problems)}"


def _section_at(location: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    of_dict = False
    for name in location:
        if isinstance(name, int) or of_dict:  # of an entry in a list or a dict of sections
            of_dict = False
            continue
        annotation = section.model_fields[str(name)].annotation
        of_dict = get_origin(annotation) is dict
        section = next(
            t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return section
