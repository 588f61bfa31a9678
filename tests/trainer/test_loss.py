"""The loss law: neither micro-batches nor ranks change the loss or a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor

from farspan.trainer.loss import LossLaw

pytestmark = pytest.mark.distributed

CLASSES = 11
# Valid tokens of each micro-batch, by rank: one beside thousands, and a rank that is all masked.
VALID = ([1, 3000], [1500, 7], [0, 0])
TOKENS = 3200


def micro_batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Features `[tokens, 5]` and labels, of which as many as `VALID` says are not -100; fp64."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    features = torch.randn(TOKENS, 5, generator=generator, dtype=torch.float64) * (1 + rank)
    labels = torch.randint(0, CLASSES, (TOKENS,), generator=generator)
    labels[torch.randperm(TOKENS, generator=generator)[VALID[rank][number] :]] = -100
    return features, labels


def token_losses(weight: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(features @ weight, labels, ignore_index=-100, reduction="none")


def start_weight() -> Tensor:
    weight = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return weight.requires_grad_()


def one_step(rank: int, world: int) -> tuple[int, float, float, Tensor]:
    """Valid tokens, summed objectives and mean loss of a step, and its gradient, averaged as DeepSpeed averages."""
    group = dist.group.WORLD
    assert group is not None
    weight = start_weight()
    law = LossLaw.of_step(sum(VALID[rank]), group, torch.device("cpu"))
    total, objectives = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for number in range(2):
        losses = token_losses(weight, *micro_batch(rank, number))
        objective = law.objective(losses.sum())
        objective.backward()
        objectives += objective.detach()
        total += losses.detach().sum()
    assert weight.grad is not None
    for tensor in (objectives, weight.grad):
        dist.all_reduce(tensor)
        tensor /= world
    before = total.clone()
    loss = law.mean(total)
    assert torch.equal(total, before)
    return law.valid_tokens, float(objectives), loss, weight.grad


def test_a_step_in_parts_equals_one_batch(pool: Pool) -> None:
    parts = [micro_batch(rank, number) for rank in range(3) for number in range(2)]
    features, labels = (torch.cat(tensors) for tensors in zip(*parts))
    weight = start_weight()
    expected = torch.nn.functional.cross_entropy(features @ weight, labels, ignore_index=-100)
    expected.backward()
    # A mean of micro-batches' or ranks' means would be something else.
    means = [token_losses(weight, *part).detach()[part[1] != -100].mean() for part in parts[:4]]
    assert abs(float(torch.stack(means).mean() / expected.detach()) - 1) > 0.01
    for valid, objective, loss, gradient in pool.run(3, one_step):
        assert valid == sum(map(sum, VALID))
        assert objective == pytest.approx(expected.item(), rel=1e-12)
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-12, atol=1e-15)


def count_beyond_32_bits(rank: int, world: int) -> int:
    group = dist.group.WORLD
    assert group is not None
    return LossLaw.of_step(2**31 - 1, group, torch.device("cpu")).valid_tokens


def test_tokens_are_counted_beyond_32_bits(pool: Pool) -> None:
    assert pool.run(3, count_beyond_32_bits) == [3 * (2**31 - 1)] * 3
