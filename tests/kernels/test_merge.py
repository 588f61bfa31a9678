from __future__ import annotations

import pytest
import torch

from farspan.kernels import merge, merge_into
from farspan.kernels.triton.rows import merge_into as merge_by_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def _part(seed: int, lse: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(seed))
    return out, torch.full((1, 2, 3), lse)


def test_a_side_that_sees_nothing_changes_nothing() -> None:
    (out, lse), nothing = _part(0, 1.5), (torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -INF))
    for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    both = merge(*nothing, *nothing)
    assert torch.equal(both[0], nothing[0])
    assert torch.equal(both[1], nothing[1])


@pytest.mark.parametrize("gap", [0.0, 1.0, 88.0, 100.0, 1e4])
def test_gaps_of_any_size(gap: float) -> None:
    (a, lse_a), (b, lse_b) = _part(1, -gap / 2), _part(2, gap / 2)
    out, lse = merge(a, lse_a, b, lse_b)
    weight = torch.sigmoid(torch.tensor(gap, dtype=torch.float64))
    assert torch.allclose(out.double(), a.double() * (1 - weight) + b.double() * weight, atol=1e-6)
    assert torch.allclose(lse.double(), torch.logaddexp(lse_a.double(), lse_b.double()), atol=1e-6)


def test_associative_and_symmetric_to_rounding() -> None:
    parts = [_part(seed, lse) for seed, lse in ((3, 0.3), (4, -2.0), (5, 5.0))]
    left = merge(*merge(*parts[0], *parts[1]), *parts[2])
    right = merge(*parts[0], *merge(*parts[2], *parts[1]))
    assert torch.allclose(left[0], right[0], atol=1e-6)
    assert torch.allclose(left[1], right[1], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_merges_in_place_as_torch_does(dtype: torch.dtype) -> None:
    """Into views of larger totals, with rows in which one side, or both, saw nothing, and gaps of any size."""
    rows, heads, dim = 70, 3, 80
    generator = torch.Generator().manual_seed(6)
    totals = torch.randn(2, 100, heads, dim, generator=generator), torch.randn(2, heads, 100, generator=generator)
    part = torch.randn(2, heads, rows, dim, generator=generator).to(dtype).transpose(1, 2)
    part_lse = torch.randn(2, heads, rows, generator=generator) * 100
    totals[1][:, :, 20:40] = -INF
    totals[0][:, 20:40] = 0
    part_lse[:, :, 10:20] = -INF
    part[:, 10:20] = 0
    totals[1][:, :, 15], totals[0][:, 15] = -INF, 0
    by_torch = tuple(x.double() for x in totals)
    by_kernel = tuple(x.to(DEVICE) for x in totals)
    for (out, lse), merge_in_place in ((by_torch, merge_into), (by_kernel, merge_by_kernel)):
        merge_in_place(out[:, 10:80], lse[:, :, 10:80], part.to(out.device), part_lse.to(lse.device))
    for got, wanted in zip(by_kernel, by_torch, strict=True):
        assert torch.allclose(got.cpu().double(), wanted, atol=1e-5)
    out, lse = (x.cpu() for x in by_kernel)
    assert torch.equal(out[:, :10], totals[0][:, :10])
    assert torch.equal(out[:, 30:40], part[:, 20:30].float())
    assert torch.equal(lse[:, :, 30:40], part_lse[:, :, 20:30])
    assert not out[:, 25].any()
    assert (lse[:, :, 25] == -INF).all()
