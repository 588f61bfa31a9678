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

TOKENS, HIDDEN, VOCABULARY = 23, 8, 30
FACTOR = 0.37  # of the sum in what is differentiated, as the number of valid tokens is in training


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels; tokens 0, 3, 6 ... have no label, so that chunks of one are all masked."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def on_mesh(world: int, case: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a case where all ranks are one tensor group."""
    mesh = Mesh.create(Degrees(1, 1, world), torch.device("cpu"))
    try:
        return case(*arguments)
    finally:
        mesh.destroy()


def losses_and_gradients(
    rank: int, world: int, chunk_tokens: int, poison: float | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Losses, and the gradients of hidden and of this rank's rows of the weight."""
    hidden, whole, labels = inputs(dtype)
    weight = whole.detach().chunk(world)[rank].clone().requires_grad_()
    if poison is not None:
        hidden.data[labels == -100] = poison
    total, losses = VocabularyLoss(chunk_tokens, Sharding(world))(hidden, weight, labels)
    assert total.dtype == torch.float64
    assert total.item() == losses.double().sum().item()
    (FACTOR * total).backward()
    with torch.no_grad():
        _, again = VocabularyLoss(chunk_tokens, Sharding(world))(hidden, weight, labels)
    assert torch.equal(again, losses)
    assert not losses.requires_grad
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses, hidden.grad, weight.grad


def run_chunks(rank: int, world: int, *arguments: Any) -> tuple[Tensor, ...]:
    return on_mesh(world, losses_and_gradients, rank, world, *arguments)


def expected() -> tuple[Tensor, ...]:
    hidden, weight, labels = inputs()
    rows, matrix = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(rows @ matrix.T, labels, ignore_index=-100, reduction="none")
    return losses.detach(), *torch.autograd.grad(FACTOR * losses.sum(), (rows, matrix))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
def test_equals_cross_entropy_for_any_chunk(pool: Pool, chunk_tokens: int, world: int) -> None:
    wanted = expected()
    ignored = inputs()[2] == -100
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        results = pool.run(world, run_chunks, chunk_tokens, None, dtype)
        for losses, dhidden, _ in results:
            assert losses.dtype == dtype
            torch.testing.assert_close(losses.double(), wanted[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(dhidden.double(), wanted[1], rtol=tolerance, atol=tolerance)
            assert bool((losses[ignored] == 0).all())
            assert bool((dhidden[ignored] == 0).all())
        dweight = torch.cat([result[2] for result in results])
        torch.testing.assert_close(dweight.double(), wanted[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_rounds_results_not_sums(pool: Pool, world: int) -> None:
    """Against fp64 of the same bf16 inputs, in chunks of one token: the weight's gradient is a sum of 23 chunks."""
    hidden, weight, labels = inputs(torch.bfloat16)
    rows, matrix = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(rows @ matrix.T, labels, ignore_index=-100, reduction="none")
    wanted = torch.autograd.grad(FACTOR * losses.sum(), (rows, matrix))
    results = pool.run(world, run_chunks, 1, None, torch.bfloat16)
    assert all(result[0].dtype == torch.float32 for result in results)
    for got, exact in zip((results[0][1], torch.cat([result[2] for result in results])), wanted):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - exact).norm() / exact.norm()) < 4e-3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_tokens_without_a_label_have_no_loss_and_no_gradient_whatever_they_hold(
    pool: Pool, chunk_tokens: int, poison: float
) -> None:
    """Their logits are NaN here. Multiplying by a mask would make the whole step's loss and gradient NaN."""
    (got,) = pool.run(1, run_chunks, chunk_tokens, poison, torch.float32)
    ignored = inputs()[2] == -100
    wanted = expected()
    assert bool((got[0][ignored] == 0).all())
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    assert bool((got[1][ignored] == 0).all())
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2].double(), wanted[2], rtol=1e-5, atol=1e-5)


def second_backward() -> str:
    total, _ = VocabularyLoss(7, Sharding())(*inputs())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as caught:
        total.backward()
    return str(caught.value)


def run_second_backward(rank: int, world: int) -> str:
    return str(on_mesh(1, second_backward))


def test_a_second_backward_pass_is_refused(pool: Pool) -> None:
    (message,) = pool.run(1, run_second_backward)
    assert message == "the gradients of the loss are for one backward pass, and this is the second"


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns, and how many operators there are."""

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
    """Elements of the largest tensor forward and backward, and operators of the backward pass."""
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with Largest() as forward:
        total, _ = VocabularyLoss(chunk_tokens, Sharding())(hidden, weight, labels)
    with Largest() as backward:
        total.backward()
    assert forward.operators > tokens // chunk_tokens
    return [forward.elements, backward.elements, backward.operators]


def run_memory(rank: int, world: int, *sizes: int) -> list[int]:
    return on_mesh(1, memory, *sizes)


def test_the_full_logits_never_exist(pool: Pool) -> None:
    """In the forward pass there are those of one chunk; in the backward pass there are none, nor any work on chunks."""
    tokens, hidden_size, vocabulary, chunk_tokens = 512, 8, 500, 16
    ((forward, backward, operators),) = pool.run(1, run_memory, tokens, hidden_size, vocabulary, chunk_tokens)
    assert forward == chunk_tokens * vocabulary
    assert backward == max(tokens, vocabulary) * hidden_size
    assert operators < tokens // chunk_tokens
