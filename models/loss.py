"""The output projection and its cross-entropy, in chunks of tokens, so that the full logits never exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn

from farspan.kernels import accumulation_dtype
from farspan.models.compiled import compiled
from farspan.models.layers import Sharding

IGNORED = -100


class VocabularyLoss(nn.Module):
    """Cross-entropy of a vocabulary that tensor ranks share."""

    def __init__(self, chunk_tokens: int, sharding: Sharding) -> None:
        super().__init__()
        self.chunk_tokens, self.sharding = chunk_tokens, sharding

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of all tokens' losses, fp64, and each token's loss `[tokens]`, fp32, 0 where it is `IGNORED`.

        Args:
            hidden: `[tokens, hidden]` (a tensor rank's share of them under sequence parallelism).
            weight: this rank's rows of the projection, `[vocabulary / tensor, hidden]`.
            labels: `[tokens]`.

        Only the sum is differentiable. So a token's gradient is known but for one factor that all tokens share, and is
        computed beside its loss: memory is that of one chunk's logits, which are never computed again.
        """
        if self.sharding.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        group = parallel_state.get_tensor_model_parallel_group()
        return _ChunkedLoss.apply(hidden, weight, labels, self.chunk_tokens, group, torch.is_grad_enabled())


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        group: dist.ProcessGroup,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        work = accumulation_dtype(hidden.dtype)
        losses = torch.empty_like(labels, dtype=work)
        gradients = (torch.empty_like(hidden), torch.zeros_like(weight, dtype=work)) if with_gradients else None
        for begin in range(0, len(labels), chunk_tokens):
            chunk = slice(begin, begin + chunk_tokens)
            into = (gradients[0][chunk], gradients[1]) if gradients else None
            losses[chunk] = _chunk_losses(hidden[chunk], weight, labels[chunk], group, into)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(losses)
        return losses.sum(dtype=torch.float64), losses

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of the loss are for one backward pass, and this is the second")
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        factor = factor.to(dweight.dtype)
        return _scaled(dhidden, factor, dhidden.dtype), _scaled(dweight, factor, dhidden.dtype), None, None, None, None


def _chunk_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup, gradients: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Losses of some tokens; of their sum's gradients that of `hidden` is written, that of `weight` is added."""
    ignored = labels == IGNORED
    # Chosen, not multiplied by a mask: what a token without a label holds may be inf or NaN.
    rows = torch.where(ignored[:, None], hidden.new_zeros(()), hidden)
    columns = torch.where(ignored, -1, labels - group.rank() * len(weight))
    logits = rows @ weight.T
    lse, target = _over_ranks(*_row_statistics(logits, columns), group)
    if gradients is not None:
        dhidden, dweight = gradients
        _logits_to_gradient(logits, torch.where(ignored, torch.inf, lse), columns)
        torch.mm(logits, weight, out=dhidden)
        _add_product(dweight, logits.T, rows)
    return torch.where(ignored, 0, lse - target)


@compiled
def _row_statistics(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its maximum, the sum of exp(logit - maximum), and the logit of its column, 0 if it is not here."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    maximum = wide.amax(-1)
    total = (wide - maximum[:, None]).exp().sum(-1)
    here = (columns >= 0) & (columns < logits.shape[1])
    target = wide.gather(1, torch.where(here, columns, 0)[:, None])[:, 0]
    return maximum, total, torch.where(here, target, 0)


def _over_ranks(maximum: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """lse and the label's logit of each row over the vocabulary of all tensor ranks, from each rank's statistics."""
    if group.size() > 1:
        largest = maximum.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        sums = torch.stack((total * (maximum - largest).exp(), target))
        dist.all_reduce(sums, group=group)
        maximum, (total, target) = largest, sums
    return maximum + total.log(), target


@compiled
def _logits_to_gradient(logits: Tensor, lse: Tensor, columns: Tensor) -> None:
    """In place: softmax - 1 at the row's column; 0 in a row whose lse is inf and column is -1."""
    probability = (logits.to(lse.dtype) - lse[:, None]).exp()
    hit = torch.arange(logits.shape[1], device=logits.device) == columns[:, None]
    logits.copy_(probability - hit.to(lse.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` without rounding the product to the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@compiled
def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * factor` with one rounding, to `dtype`: the factor itself is not rounded to the dtype of x."""
    return (x.to(factor.dtype) * factor).to(dtype)
