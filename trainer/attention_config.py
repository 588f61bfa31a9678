"""The configuration of attention: what computes it, and what tokens see."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from farspan.kernels.estimate import MoBA, Settings, VerticalSlash, XAttention
from farspan.kernels.tiles import TILE
from farspan.trainer.section import Section


class StarSection(Section):
    """Star Attention (docs/star.md)."""

    block: int = Field(gt=0)
    """Tokens of one block of a document's context; context tokens see their own block and the anchor."""
    anchor: int | None = Field(None, gt=0)
    """The first tokens of a document, which all its context sees: at most `block`, and `block` when not given."""
    mode: Literal["lm", "sft"] = "lm"
    """Which part of a document is global and sees all of it: its end (`lm`), or question and answer (`sft`). All tokens
    of `lm` carry loss; for `sft` the data says where a context ends, and which tokens carry loss: those of answers."""
    global_fraction: float = Field(0.25, gt=0, lt=1)
    """Share of a document, at its end, that is global with `mode: lm`; with `sft` that which `farspan plan` assumes."""

    @model_validator(mode="after")
    def _check_anchor(self) -> StarSection:
        if self.anchor_tokens > self.block:
            raise ValueError(
                f"attention.star.anchor {self.anchor} is more than attention.star.block {self.block}; lower it, or "
                "leave it out for an anchor of one block"
            )
        return self

    @property
    def anchor_tokens(self) -> int:
        return self.anchor or self.block

    @property
    def in_words(self) -> str:
        part = f"the last {self.global_fraction:g} of a document" if self.mode == "lm" else "question and answer"
        return f"blocks of {self.block:,} tokens, anchors of {self.anchor_tokens:,}; global is {part}"

    @property
    def warning(self) -> str | None:
        """What is possible, but hardly meant."""
        if self.block >= 256:
            return None
        return (
            f"attention.star.block is {self.block}: with blocks of less than 256 tokens a model sees little of its "
            "context, and kernels compute mostly borders"
        )


class WindowSection(Section):
    """Sliding-window attention, in all layers but some."""

    width: int = Field(gt=0)
    """The last tokens that a token sees, itself included."""
    sinks: int = Field(0, ge=0)
    """The first tokens of a document, which all of it sees besides."""
    full_layers: list[Annotated[int, Field(ge=0)]] = Field([])
    """Layers, from 0, that see all of a document (or with `attention.star` its blocks), between those with windows."""


ESTIMATORS: dict[str, type[Settings]] = {"vertical_slash": VerticalSlash, "xattention": XAttention, "moba": MoBA}


class SparseSection(Section):
    """Dynamic sparse attention (docs/sparse-attention.md). Keys of an estimator are for that one alone."""

    estimator: Literal["vertical_slash", "xattention", "moba"] = "vertical_slash"
    """What a selection is, and from what it is estimated: diagonals of tiles and single columns, from the attention of
    some rows (`vertical_slash`, MTraining); tiles, from sums over antidiagonals (`xattention`); chunks of keys for each
    token, from their mean keys (`moba`)."""
    mass: float = Field(0.9, gt=0, le=1)
    """`vertical_slash`, as are the following keys up to `most_diagonals`, and `budgets`: share of what the probe rows
    attend to that each head's selection computes, unless a cap stops it."""
    probes: Literal[16, 32, 64, 128] = 64
    """Rows of a probe set, from whose attention a selection is estimated: the last ones of a sequence."""
    segments: int = Field(1, gt=0)
    """Equal parts of a sequence, each with a probe set at its end."""
    documents: int = Field(1, ge=0)
    """How many of a sequence's documents, the longest, have a probe set at their ends as well; where the sequence ends
    with one of them, that is no other set."""
    sinks: int = Field(30, ge=0)
    """First tokens of a sequence, which are always selected."""
    local_blocks: int = Field(2, gt=0)
    """Nearest diagonals of 128 x 128 tiles, which are always selected; the first is a token's own block."""
    most_columns: int = Field(4096, gt=0)
    """Single keys that a head selects at most, besides `sinks`; 128 of them cost as much as a diagonal."""
    most_diagonals: int = Field(512, gt=0)
    """Diagonals of tiles that a head selects at most, besides `local_blocks`."""
    stride: Literal[4, 8, 16, 32, 64] = 16
    """`xattention`: tokens of a cell's side, within which one antidiagonal stands for attention."""
    threshold: float = Field(0.9, gt=0, le=1)
    """`xattention`: share of the attention between cells that a block of rows computes."""
    chunk: int = Field(4096, gt=0, multiple_of=TILE)
    """`moba`: tokens of a chunk."""
    top_k: int = Field(12, gt=0)
    """`moba`: chunks that a token computes at most, its own one among them."""
    budgets: Path | None = None
    """A file of `farspan calibrate`: heads select as many columns and diagonals as that says, whatever their mass."""
    refresh: int = Field(1, gt=0)
    """Steps for which a layer keeps its selection before it is estimated anew."""
    dense_layers: list[Annotated[int, Field(ge=0)]] = Field([])
    """Layers, from 0, whose attention stays dense."""
    dense_steps: int = Field(0, ge=0)
    """The run's first steps, which train with dense attention; evaluation goes by `evaluate` from the first one on."""
    train: bool = True
    """Whether training selects; if not, evaluation alone does."""
    evaluate: bool = True
    """Whether evaluation selects."""
    report_every: int = Field(20, gt=0)
    """Steps between reports of the selections' balance over ranks."""
    expected_density: float | None = Field(None, gt=0, le=1)
    """Share of causal attention that selections are expected to compute, for predictions alone (`farspan plan` and
    `parallel.plan: auto`); when not given, what `budgets` or the caps allow at most."""

    def layers(self, count: int, window: WindowSection | None) -> list[int]:
        """Those of so many layers that select: all without a window but `dense_layers`."""
        full = range(count) if window is None else window.full_layers
        return sorted(set(full) - set(self.dense_layers))

    @property
    def settings(self) -> Settings:
        method = ESTIMATORS[self.estimator]
        return method(**{field.name: getattr(self, field.name) for field in fields(method)})

    @model_validator(mode="after")
    def _check_estimator(self) -> SparseSection:
        for name in ESTIMATORS:
            given = [key for key in _own_keys(name) if key in self.model_fields_set]
            if name != self.estimator and given:
                raise ValueError(
                    f"attention.sparse.{given[0]} is for attention.sparse.estimator {name}, and this is "
                    f"{self.estimator}; leave it out, or set attention.sparse.estimator to {name}"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_keys_of_others(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        others = {key for name in ESTIMATORS if name != self.estimator for key in _own_keys(name)}
        return {key: value for key, value in dump(self).items() if key not in others}


def _own_keys(estimator: str) -> list[str]:
    """What only this estimator reads."""
    return [field.name for field in fields(ESTIMATORS[estimator])] + ["budgets"] * (estimator == "vertical_slash")


class AttentionSection(Section):
    backend: str = "deterministic"
    """Kernels that compute attention on one device: `auto` is the fastest for each piece of work, `deterministic` the
    fastest whose gradients repeat bit for bit; or a backend's name, which then computes all."""
    across_documents: bool = False
    """Whether tokens see earlier documents of their row; if not, rotary positions restart at each document."""
    star: StarSection | None = None
    """Star Attention, by any plan, for every layer that has no window; dense attention when not given."""
    window: WindowSection | None = None
    """Sliding windows for all layers but `full_layers`; none when not given."""
    sparse: SparseSection | None = None
    """Dynamic sparse attention in all layers without a window but `dense_layers`; none when not given."""
