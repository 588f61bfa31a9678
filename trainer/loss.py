"""The loss law: the sum of token losses over the number of valid tokens of the whole optimizer step.

The number is that of all micro-batches and all data x context ranks, known before the first backward pass. So neither
how a step is cut into micro-batches nor how a sequence is cut over ranks changes the loss or a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LossLaw:
    """Scales one optimizer step's losses. Tensor ranks compute the same losses and take no part in sums."""

    valid_tokens: int
    group: dist.ProcessGroup
    device: torch.device

    @classmethod
    def of_step(cls, local_valid: int, group: dist.ProcessGroup, device: torch.device) -> LossLaw:
        """Collective over `group` (data x context): counts the valid tokens of all its ranks."""
        count = torch.tensor(local_valid, dtype=torch.int64, device=device)
        dist.all_reduce(count, group=group)
        return cls(int(count), group, device)

    def objective(self, local_sum: Tensor) -> Tensor:
        """What this micro-batch adds to the loss, from the sum of its token losses.

        DeepSpeed averages gradients over the group; times the size of the group, the average is the sum that is meant.
        """
        return local_sum / self.valid_tokens * self.group.size()

    def mean(self, local_sum: Tensor) -> float:
        """Collective: the loss of the step, from each rank's sum of token losses."""
        total = local_sum.detach().to(torch.float64, copy=True)
        dist.all_reduce(total, group=self.group)
        return float(total) / self.valid_tokens
