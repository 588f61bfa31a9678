"""What a decoder is made of: the `model` section of the configuration, and the presets behind `model.preset`."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

RecomputeMode = Literal["none", "full", "selective"]


def refuse_switches(cls: type[BaseModel], given: object, info: ValidationInfo) -> object:
    """A validator of all fields: YAML's yes and no are no numbers, though pydantic takes them for 1 and 0."""
    annotation = cls.model_fields[str(info.field_name)].annotation
    if isinstance(given, bool) and {int, float} & {annotation, *get_args(annotation)}:
        raise PydanticCustomError("number", "Input should be a number")
    return given


class ModelConfig(BaseModel):
    """A Llama, Qwen or Mistral style decoder. A preset fills what is not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    _refuse_switches = field_validator("*", mode="before")(refuse_switches)

    preset: str | None = None
    """Name of a file in configs/models; keys given beside it take precedence."""
    vocabulary_size: int | None = Field(None, gt=0)
    """Rows of the embedding; the tokenizer's size when not given."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Number of decoder layers."""
    heads: int = Field(gt=0)
    """Query heads."""
    kv_heads: int = Field(gt=0)
    """Key/value heads; query head h reads kv head h // (heads // kv_heads)."""
    head_dim: int = Field(gt=0, multiple_of=2)
    """Size of one head."""
    feed_forward_size: int = Field(gt=0)
    """Width inside the SwiGLU block."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head, before rotary embeddings (Qwen3)."""
    tied_embeddings: bool = False
    """The output projection is the embedding's own matrix."""
    rotary_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary embedding's frequencies."""
    norm_epsilon: float = Field(1e-6, gt=0)
    """Added to the mean square inside RMSNorm."""
    initializer_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights; output projections have it divided by sqrt(2 x layers) (GPT-2)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        return {**load_preset(str(given["preset"])), **given}

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads {self.heads} must be a multiple of model.kv_heads {self.kv_heads}")
        return self

    def heads_of_rank(self, tensor: int) -> tuple[int, int]:
        """Query and kv heads of one of `tensor` ranks."""
        return self.heads // tensor, self.kv_heads // tensor

    def check_tensor_degree(self, tensor: int) -> None:
        """ValueError, naming the key, when `tensor` ranks cannot share these layers evenly."""
        for key in ("heads", "kv_heads", "feed_forward_size", "vocabulary_size"):
            size = getattr(self, key)
            if size is not None and size % tensor:
                raise ValueError(f"model.{key} {size} is not a multiple of parallel.tensor {tensor}")

    def parameters(self) -> int:
        """Number of weights, embeddings included; `vocabulary_size` must be known."""
        assert self.vocabulary_size is not None
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key)
        attention += (query + 2 * key) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden_size * self.feed_forward_size + 2 * self.hidden_size
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * layer + self.hidden_size


def preset_names() -> list[str]:
    files = resources.files("farspan.configs.models").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The keys of configs/models/NAME.yaml; ValueError with the nearest name when there is none."""
    names = preset_names()
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no model.preset {name!r}; {hint}possible are {', '.join(names)}")
    text = resources.files("farspan.configs.models").joinpath(f"{name}.yaml").read_text()
    preset: dict[str, Any] = yaml.safe_load(text)
    return preset
