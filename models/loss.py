"""The output projection and its cross-entropy, in chunks of tokens, so that the full logits never exist."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farspan.models.layers import Sharding

IGNORED = -100


class VocabularyLoss(nn.Module):
    """Cross-entropy of a vocabulary that tensor ranks share."""

    def __init__(self, chunk_tokens: int, sharding: Sharding) -> None:
        super().__init__()
        self.chunk_tokens, self.sharding = chunk_tokens, sharding

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Loss of every token, fp32 `[tokens]`, 0 where the label is `IGNORED`.

        Args:
            hidden: `[tokens, hidden]` (a tensor rank's share of them under sequence parallelism).
            weight: this rank's rows of the projection, `[vocabulary / tensor, hidden]`.
            labels: `[tokens]`.

        A chunk's logits are computed again in the backward pass; memory is that of one chunk.
        """
        if self.sharding.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        losses = [
            checkpoint(_chunk_losses, rows, weight, chosen, use_reentrant=False)
            for rows, chosen in zip(hidden.split(self.chunk_tokens), labels.split(self.chunk_tokens))
        ]
        return torch.cat(losses)


def _chunk_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # Chosen, not multiplied by a mask: what a token without a label holds may be inf or NaN. On the way in, too, since
    # the gradient of its loss would be 0 x NaN.
    ignored = labels == IGNORED
    logits = nn.functional.linear(torch.where(ignored[:, None], hidden.new_zeros(()), hidden), weight)
    losses = vocab_parallel_cross_entropy(logits.float(), labels.clamp(min=0))
    return torch.where(ignored, losses.new_zeros(()), losses)
