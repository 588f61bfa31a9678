"""The chunked cross-entropy of a vocabulary: right, indifferent to what has no label, and small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farspan.models.layers import Sharding
from farspan.models.loss import VocabularyLoss
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh

pytestmark = pytest.mark.distributed

TOKENS, HIDDEN, VOCABULARY = 23, 8, 31


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels; tokens 0, 3, 6 ... have no label, so that chunks of one are all masked."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def on_one_rank(case: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a case where Megatron's tensor group is this rank alone."""
    mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
    try:
        return case(*arguments)
    finally:
        mesh.destroy()


def losses_and_gradients(chunk_tokens: int, poison: float | None) -> tuple[Tensor, ...]:
    hidden, weight, labels = inputs()
    if poison is not None:
        hidden.data[labels == -100] = poison
    losses = VocabularyLoss(chunk_tokens, Sharding())(hidden, weight, labels)
    losses.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def run_chunks(rank: int, world: int, chunk_tokens: int, poison: float | None) -> tuple[Tensor, ...]:
    return on_one_rank(losses_and_gradients, chunk_tokens, poison)


def expected() -> tuple[Tensor, ...]:
    hidden, weight, labels = inputs()
    rows, matrix = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(rows @ matrix.T, labels, ignore_index=-100, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses.sum(), (rows, matrix))


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
def test_equals_cross_entropy_for_any_chunk(pool: Pool, chunk_tokens: int) -> None:
    (got,) = pool.run(1, run_chunks, chunk_tokens, None)
    assert got[0].dtype == torch.float32
    for tensor, wanted in zip(got, expected(), strict=True):
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-5)
    ignored = inputs()[2] == -100
    assert bool((got[0][ignored] == 0).all())
    assert bool((got[1][ignored] == 0).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_tokens_without_a_label_have_no_loss_and_no_gradient_whatever_they_hold(
    pool: Pool, chunk_tokens: int, poison: float
) -> None:
    """Their logits are NaN here. Multiplying by a mask would make the whole step's loss and gradient NaN."""
    (got,) = pool.run(1, run_chunks, chunk_tokens, poison)
    ignored = inputs()[2] == -100
    wanted = expected()
    assert bool((got[0][ignored] == 0).all())
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    assert bool((got[1][ignored] == 0).all())
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2].double(), wanted[2], rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators += 1
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def memory(tokens: int, hidden_size: int, vocabulary: int, chunk_tokens: int) -> list[int]:
    """Elements of the largest tensor forward and backward, and of all tensors saved in between."""
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    saved: dict[int, int] = {}  # elements by address: inputs are saved by every chunk, and are one tensor

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = VocabularyLoss(chunk_tokens, Sharding())(hidden, weight, labels).sum()
    with Largest() as backward:
        loss.backward()
    assert forward.operators > tokens // chunk_tokens
    assert backward.operators > tokens // chunk_tokens
    return [forward.elements, backward.elements, sum(saved.values())]


def run_memory(rank: int, world: int, *sizes: int) -> list[int]:
    return on_one_rank(memory, *sizes)


def test_the_full_logits_never_exist(pool: Pool) -> None:
    """Neither as one tensor nor as chunks that are kept for the backward pass."""
    tokens, hidden_size, vocabulary, chunk_tokens = 128, 8, 500, 16
    ((forward, backward, saved),) = pool.run(1, run_memory, tokens, hidden_size, vocabulary, chunk_tokens)
    assert forward == backward == chunk_tokens * vocabulary
    assert saved < chunk_tokens * vocabulary
