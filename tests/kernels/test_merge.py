from __future__ import annotations

import pytest
import torch

from farspan.kernels import merge

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
