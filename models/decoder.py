"""The decoder: embedding, layers, final norm and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.tensor_parallel import VocabParallelEmbedding, scatter_to_sequence_parallel_region
from torch import Tensor, nn

from farspan.models.attention import Attending, AttentionContext, LayerIndex, Selector, SelfAttention
from farspan.models.config import ModelConfig
from farspan.models.layers import FeedForward, RMSNorm, Sharding, column_linear
from farspan.models.loss import VocabularyLoss
from farspan.models.recompute import Recomputation
from farspan.models.rotary import inverse_frequencies, rotation
from farspan.parallel.execute import Groups
from farspan.parallel.prepare import PreparedPlan


@dataclass(frozen=True, eq=False)
class DecoderInput:
    """One micro-batch as a context rank holds it: its slots of every row, already in the plan's order.

    tokens, labels and rotary_positions are int64 `[B, slots]`; a label of -100 is no label. `plans` are those of the
    layers, one each, all over one order; layers with the same mask share theirs. `selectors` likewise: what chooses a
    layer's sparse attention, None for a dense one.
    """

    tokens: Tensor
    labels: Tensor
    rotary_positions: Tensor
    plans: Sequence[PreparedPlan]
    group: Groups
    selectors: Sequence[Selector | None] | None = None


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, name: str, config: ModelConfig, sharding: Sharding) -> None:
        super().__init__()
        out_std = config.initializer_std / math.sqrt(2 * config.layers)
        partial = sharding.sequence_parallel
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, partial)
        self.attention = SelfAttention(f"{name}.attention", config, out_std, sharding)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon, partial)
        self.feed_forward = FeedForward(
            f"{name}.feed_forward",
            config.hidden_size,
            config.feed_forward_size,
            config.initializer_std,
            out_std,
            sharding,
        )

    def forward(self, x: Tensor, context: Attending) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """A decoder-only language model whose forward pass is its loss.

    `config.vocabulary_size` must be set; Megatron's tensor-parallel group must exist, also for one rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        sharding: Sharding,
        *,
        loss_chunk_tokens: int = 8192,
        backend: str = "auto",
        recomputation: Recomputation | None = None,
    ) -> None:
        super().__init__()
        if config.vocabulary_size is None:
            raise ValueError("a decoder needs model.vocabulary_size")
        config.check_tensor_degree(sharding.tensor)
        self.config, self.sharding, self.backend = config, sharding, backend
        self.run_layers = recomputation or Recomputation()
        self.embedding = VocabParallelEmbedding(
            config.vocabulary_size,
            config.hidden_size,
            init_method=sharding.normal("embedding", config.initializer_std),
            config=sharding.megatron(),
        )
        self.layers = nn.ModuleList(Layer(f"layers.{i}", config, sharding) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, sharding.sequence_parallel)
        if not config.tied_embeddings:
            self.projection = column_linear(
                "projection", config.hidden_size, config.vocabulary_size, config.initializer_std, sharding
            )
        self.loss = VocabularyLoss(loss_chunk_tokens, sharding)
        self.frequencies = inverse_frequencies(config.head_dim, config.rotary_theta)

    def forward(self, batch: DecoderInput) -> tuple[Tensor, Tensor]:
        """The sum of all slots' cross-entropy, fp64, which has the gradient, and that of each slot.

        The latter is fp32 `[B, slots]`, 0 where there is no label, and has no gradient.
        """
        turn = rotation(batch.rotary_positions, self.frequencies)
        contexts = [
            AttentionContext(plan, batch.group, turn, self.backend, index=select and LayerIndex(select))
            for plan, select in zip(batch.plans, batch.selectors or [None] * len(self.layers), strict=True)
        ]
        x = self.embedding(batch.tokens.flatten())
        if self.sharding.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x)
        x = self.run_layers(self.layers, x, contexts)
        total, losses = self.loss(self.norm(x), self.output_weight, batch.labels.flatten())
        return total, losses.view_as(batch.labels)

    @property
    def output_weight(self) -> Tensor:
        """This tensor rank's rows of the projection, `[vocabulary / tensor, hidden]`."""
        weight: Tensor = self.embedding.weight if self.config.tied_embeddings else self.projection.weight
        return weight
