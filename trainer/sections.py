"""The sections of a configuration that are not about the model, attention or data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from farspan.models.config import RecomputeMode
from farspan.parallel.plans import Topology
from farspan.trainer.section import Section


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
