"""The configuration of data: its sources, how rows are made of them, and in which order they come."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from farspan.data.growing_window import Growth
from farspan.data.layout import Overlong
from farspan.data.sources import MAX_RECORD_BYTES, TEXT_SUFFIXES, Source
from farspan.trainer.section import Section, did_you_mean


class DecomposeSection(Section):
    """Dataset decomposition (docs/dataset-decomposition.md), for `data.method: decompose`."""

    shortest: int = Field(256, gt=1)
    """Tokens of the shortest rows, a power of two; those of the longest are `train.sequence_length`. What a document
    has left beyond its rows is shorter than these, and is not trained on."""
    randomize: bool = True
    """Draw the lengths of rows in documents of two of the longest or more, so that all get equally many of their
    tokens; if not, these are cut into the longest."""


class GrowingWindowSection(Section):
    """SkyLadder (docs/packing.md): windows that divide rows, and grow with the steps of training."""

    start: int = Field(32, gt=0)
    """Tokens of a window in the first step."""
    steps: int = Field(gt=0)
    """Steps after which a window is the whole row."""
    growth: Growth = "linear"
    """By equally many tokens a step, faster at first (`sine`), or by equal factors (`exponential`)."""


class PartSection(Section):
    """A part of a blend: documents of one source, all or those of some lengths."""

    source: str | None = None
    """The source's name; the part's own when not given."""
    min_tokens: int = Field(0, ge=0)
    """Tokens of its shortest documents."""
    max_tokens: int | None = Field(None, gt=0)
    """Tokens of its longest documents."""
    weight: float | None = Field(None, ge=0)
    """Its share of the run's tokens, over the sum of all weights; without any, parts share as tokens x `epochs` do."""
    epochs: float | None = Field(None, gt=0)
    """How often it is seen at most; the others then take over its share."""


class StageSection(Section):
    """A stretch of a run with weights of its own."""

    steps: int | None = Field(None, gt=0)
    """How many steps it takes, with `decompose` whole cycles; the rest of the run when not given, which the last one
    alone may do."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """Shares of the tokens by the names of parts; one that is not named rests."""


class BlendSection(Section):
    """A blend of sources, or of their long and short documents (docs/packing.md)."""

    parts: dict[str, PartSection] = Field(min_length=1)
    """What is blended, by names that the metrics use."""
    stages: list[StageSection] = Field([])
    """Weights that change in the course of the run; those of the parts throughout when not given."""

    @model_validator(mode="after")
    def _check_stages(self) -> BlendSection:
        for stage in self.stages[:-1]:
            if stage.steps is None:
                raise ValueError("data.blend.stages: only the last one can do without steps")
        named = [name for stage in self.stages for name in stage.weights]
        for name in [name for name in named if name not in self.parts]:
            hint = did_you_mean(name, list(self.parts)) or ";"
            raise ValueError(f"data.blend.stages name {name!r}{hint} data.blend.parts are {', '.join(self.parts)}")
        weighted = [name for name, part in self.parts.items() if part.weight is not None]
        if weighted and self.stages:
            raise ValueError(
                f"data.blend.parts.{weighted[0]}.weight does nothing beside data.blend.stages, which have weights of "
                "their own; leave it out"
            )
        if weighted and len(weighted) < len(self.parts):
            bare = next(name for name in self.parts if name not in weighted)
            raise ValueError(
                f"data.blend.parts.{weighted[0]} has a weight and {bare} has none; give one to all parts, or to none"
            )
        return self


class SourceSection(Section):
    path: str
    """As `data.sources` has it where it is no section."""
    name: str | None = Field(None, min_length=1)
    """How reports and blends call it; the last part of the path when not given."""
    text_key: str = Field("text", min_length=1)
    """The field of a `.jsonl` line, or the column of a table, that holds the text."""
    as_one_document: bool = False
    """Whether the text files of a folder are one long document, in the order of their names: a code repository."""
    suffixes: list[str] = Field(list(TEXT_SUFFIXES), min_length=1)
    """What the names of text files in a folder end in."""
    chat_template: str | None = Field(None, min_length=1)
    """Lines of `.jsonl` are conversations, and answers alone carry loss (docs/packing.md): `chatml`, `plain`, a file in
    Jinja, or a `tokenizer_config.json`."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_short_as_given(self, write: SerializerFunctionWrapHandler) -> Any:
        return self.path if self == SourceSection(path=self.path) else write(self)  # type: ignore[call-arg]

    def listed(self) -> Source:
        """As `prepare` takes it."""
        return Source(
            self.path, self.name, self.text_key, self.as_one_document, tuple(self.suffixes), self.chat_template
        )


class DataSection(Section):
    sources: list[SourceSection] = Field(min_length=1)
    """Text files; `.jsonl` (also `.gz`, `.zst`) and `.parquet` files; folders of all these; folders that Hugging Face's
    `datasets` saved; Megatron's `.bin` and `.idx`; or `python-stdlib`: the sources of the running Python's own standard
    library. With more to say, an entry is a section."""
    directory: Path
    """Where `farspan prepare` writes the encoded text and where training reads it."""
    drop_invalid: bool = False
    """Whether documents that are no UTF-8, no JSON, without text or too long are left out and counted, not refused."""
    max_record_bytes: int = Field(MAX_RECORD_BYTES, gt=0)
    """The longest line of a `.jsonl` file, row of a table, or stretch of a text file without a space; each process may
    hold several of that size."""
    tokenizer: Path | None = None
    """A SentencePiece model, or a Hugging Face `tokenizer.json`; one is trained on the sources when not given."""
    end_of_document: str | None = None
    """Its piece that ends documents; `<eod>`, or the usual one of a `tokenizer.json`, when not given."""
    vocabulary_size: int = Field(32_000, ge=300)
    """Size of a tokenizer that is trained; 256 of its pieces are single bytes."""
    heldout_fraction: float = Field(0.01, gt=0, lt=1)
    """Share of the documents that are kept for evaluation; at least one of them is."""
    processes: int = Field(1, gt=0)
    """Processes that encode text during `farspan prepare`."""
    method: Literal["concat", "best_fit", "padded", "decompose"] = "concat"
    """How rows are made of documents (docs/packing.md): one after the other, cut every `train.sequence_length` tokens;
    as many whole ones as fit into a row; a row for each; or each by itself into rows whose lengths are powers of two,
    which a `curriculum` orders."""
    overlong: Overlong = "split"
    """What becomes of documents that are longer than a row, with `best_fit` and `padded`: full rows and a rest
    (`split`), their beginning (`truncate`), or nothing (`drop`)."""
    growing_window: GrowingWindowSection | None = None
    """Tokens see little of their row at first, and then more; all of it from the first step on when not given."""
    blend: BlendSection | None = None
    """Shares of the sources; as much of each as it has when not given."""
    decompose: DecomposeSection = DecomposeSection()  # type: ignore[call-arg]
    workers: int = Field(0, ge=0)
    """Processes of each rank that read rows ahead of training; with 0 the training process reads them itself."""


class CurriculumSection(Section):
    """The order of rows by length, for `data.method: decompose`. Lists go from the shortest to the longest."""

    odds: str | list[Annotated[float, Field(gt=0)]] = "uniform"
    """How likely a step is of each length while a cycle has such steps left: `uniform`; `grow_linear`, `grow_p2` or
    `grow_p100`, with which short rows come first; `shrink_p100`, with which long ones do; or a number for each."""
    mixture: Literal["natural", "equal"] | list[Annotated[float, Field(gt=0)]] = "natural"
    """Tokens of each length in a cycle: as the text has them (in a blend, that of its parts by their weights), equally
    many, or in proportion to a number for each."""
    cycles: int = Field(1, gt=0)
    """Equal parts of the run, each with the whole mixture in the order of the odds; they divide `train.steps`."""
    schedule: Literal["random", "sub_cycles"] = "random"
    """How a cycle follows the odds: by draws, or in as many parts as there are lengths, with fixed shares of each."""
