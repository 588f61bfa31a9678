"""Sparse attention on a GPU, in bf16: against the dense oracle in all rows, to lengths beyond the interpreter's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.index_cases import index_cases
from support.oracle import dense_attention, mask_cases, random_qkv
from torch import Tensor

from farspan.kernels import attend, attend_backward, masks
from farspan.kernels.estimate import VerticalSlash
from farspan.kernels.index import Places, VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

pytestmark = pytest.mark.gpu

INDEXES = [case.name for case in index_cases(16, 1, 8)]
# Of two kinds of indexes all masks, and of two masks all indexes.
CASES = sorted({*product(INDEXES, ("causal", "documents")), *product(("some", "columns in tiles"), ("window", "star"))})


def errors(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    return [
        float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-9))
        for x, y in zip(results, expected, strict=True)
    ]


@pytest.fixture(scope="module")
def dense_error() -> float:
    """Of cuDNN's dense causal attention in bf16: the largest relative error of out, dq, dk and dv."""
    length = 4096
    q, k, v, dout = (x.to("cuda", torch.bfloat16) for x in random_qkv(length, (2, 1), 128))
    mask = masks.causal(length).to("cuda")
    out, lse = attend(q, k, v, mask, backend="cudnn")
    results = (out, *attend_backward(dout, q, k, v, out, lse, mask, backend="cudnn"))
    allowed = torch.ones(1, length, length, dtype=torch.bool, device="cuda").tril()
    expected = dense_attention(q, k, v, allowed, dout)
    return max(errors(results, (expected[0], *expected[2:])))


@pytest.mark.parametrize(("length", "heads", "dim"), [(1000, (8, 2), 128), (8192, (2, 1), 128)])
@pytest.mark.parametrize(("index_name", "mask_name"), CASES)
def test_sparse_attention_is_the_dense_oracles(
    index_name: str, mask_name: str, length: int, heads: tuple[int, int], dim: int, dense_error: float
) -> None:
    """Its error in bf16 is twice that of dense cuDNN attention at most; a second run gives the same bits."""
    inputs = [x.to("cuda", torch.bfloat16) for x in random_qkv(length, heads, dim)]
    case = next(case for case in mask_cases(length) if case.name == mask_name)
    index = next(case for case in index_cases(length, heads[0], TILE) if case.name == index_name)
    whole = range(length)
    selection = VerticalSlashIndex(index.index.diagonals.cuda(), index.index.columns.cuda(), length).at(
        Places.of(whole, whole, device="cuda")
    )
    q, k, v, dout = inputs
    mask = case.mask.to("cuda")

    def run() -> tuple[Tensor, ...]:
        out, lse = attend(q, k, v, mask, index=selection, backend="triton")
        return out, *attend_backward(dout, q, k, v, out, lse, mask, index=selection, backend="triton")

    results = run()
    allowed = (index.selected & case.allowed[:, None]).cuda()
    expected = dense_attention(q, k, v, allowed, dout)
    found = errors(results, (expected[0], *expected[2:]))
    print(f"errors {[f'{x:.2e}' for x in found]}, dense {dense_error:.2e}")
    assert max(found) <= 2 * dense_error, (found, dense_error)
    assert all(torch.equal(x, y) for x, y in zip(results, run(), strict=True))
    alone = ~allowed.any(2)[0].view(heads[1], -1, length).any(1)  # keys that no row computes
    for gradient in results[2:]:
        assert not gradient[0].transpose(0, 1)[alone].any()


def test_nothing_of_a_layer_waits_for_the_device() -> None:
    """Estimation, both passes and their lists, once the mask's own tiles are known."""
    length = 4096
    q, k, v, dout = (x.to("cuda", torch.bfloat16) for x in random_qkv(length, (8, 2), 128))
    mask = masks.causal(length)
    estimator = Estimator(orders.contiguous(length, 1), mask, VerticalSlash(), 0, None, "cuda")
    places, of_gpu = Places.of(range(length), range(length), device="cuda"), mask.to("cuda")

    def layer() -> tuple[Tensor, ...]:
        index, _ = estimator(q, k)
        out, lse = attend(q, k, v, of_gpu, index=index.at(places))
        return attend_backward(dout, q, k, v, out, lse, of_gpu, index=index.at(places))

    layer()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
