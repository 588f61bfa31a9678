"""Self-attention of the decoder: in training the only module that knows that a sequence is shared by several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from farspan.kernels.index import Index
from farspan.models.config import ModelConfig
from farspan.models.layers import RMSNorm, Sharding, column_linear, row_linear
from farspan.models.rotary import Rotation
from farspan.parallel.execute import Groups, LayerMemory, attention
from farspan.parallel.prepare import PreparedPlan


class Attending(Protocol):
    """How a layer's attention is carried out."""

    @property
    def rotation(self) -> Rotation:
        """The angles of the layer's tokens, whose shape is that of the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, slots, H or Hkv, D]`, rotated, to `[B, slots, H, D]`."""


Selector = Callable[[Tensor, Tensor], Index | None]
"""From a rank's queries and keys, rotated, `[B, slots, H or Hkv, D]`, to what is selected; None for dense attention."""


class LayerIndex:
    """What one layer selects in one micro-batch: estimated once, and the same when the layer is computed again."""

    def __init__(self, select: Selector) -> None:
        self._select = select
        self._found: tuple[Index | None] | None = None

    def __call__(self, q: Tensor, k: Tensor) -> Index | None:
        if self._found is None:
            self._found = (self._select(q.detach(), k.detach()),)
        return self._found[0]


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What layers with the same mask share of one batch: the prepared plan, who carries it out, and the rotary angles.

    A layer's own are `memory`, where attention's results are kept when that layer is computed again, and `index`, what
    it computes of that which the plan's mask shows, or all of it.
    """

    plan: PreparedPlan
    group: Groups
    rotation: Rotation
    backend: str = "auto"
    memory: LayerMemory | None = None
    index: LayerIndex | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = None if self.index is None else self.index(q, k)
        given: dict[str, Any] = {"index": index, "backend": self.backend, "memory": self.memory}
        return attention(q, k, v, self.plan, self.group, **given)[0]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary embeddings; tensor ranks share the heads."""

    def __init__(self, name: str, config: ModelConfig, out_std: float, sharding: Sharding) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, std, bias = config.hidden_size, config.initializer_std, config.qkv_bias
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = column_linear(f"{name}.query", hidden, query, std, sharding, bias)
        self.key = column_linear(f"{name}.key", hidden, key, std, sharding, bias)
        self.value = column_linear(f"{name}.value", hidden, key, std, sharding, bias)
        self.out = row_linear(f"{name}.out", query, hidden, out_std, sharding)
        partial = sharding.tensor > 1
        self.query_norm = RMSNorm(config.head_dim, config.norm_epsilon, partial) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_epsilon, partial) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Attending) -> Tensor:
        """`[tokens, hidden]` to `[tokens, hidden]`; the batch's shape is that of `context.rotation`."""
        batch = context.rotation.cosine.shape[0]

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, -1, projected.shape[-1] // self.head_dim, self.head_dim)

        q, k, v = heads(self.query(x)[0]), heads(self.key(x)[0]), heads(self.value(x)[0])
        q, k = context.rotation(self.query_norm(q)), context.rotation(self.key_norm(k))
        return self.out(context.attend(q, k, v).flatten(2).flatten(0, 1))[0]
