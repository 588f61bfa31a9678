"""Rotary embeddings: the layout, the relative property, and angles that stay exact at a million tokens."""

from __future__ import annotations

import math

import pytest
import torch

from farspan.models.rotary import inverse_frequencies, rotation


def test_the_halves_of_a_head_are_turned_together() -> None:
    """Llama's layout: component i turns with component i + D/2, not with its neighbour."""
    turn = rotation(torch.tensor([[1]]), inverse_frequencies(4, 10_000.0))
    turned = turn(torch.eye(4).view(4, 1, 1, 4))[:, 0, 0]
    fast, slow = 1.0, 0.01
    expected = torch.tensor(
        [
            [math.cos(fast), 0, math.sin(fast), 0],
            [0, math.cos(slow), 0, math.sin(slow)],
            [-math.sin(fast), 0, math.cos(fast), 0],
            [0, -math.sin(slow), 0, math.cos(slow)],
        ]
    )
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("shift", [1, 1000, 900_000])
def test_scores_depend_on_differences_of_positions_only(shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 6, 2, 32, generator=generator) for _ in range(2))
    frequencies = inverse_frequencies(32, 10_000.0)
    positions = torch.tensor([[0, 1, 5, 40, 41, 977]])

    def scores(offset: int) -> torch.Tensor:
        turn = rotation(positions + offset, frequencies)
        return torch.einsum("bqhd,bkhd->bhqk", turn(q), turn(k))

    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=2e-5)
    other = rotation(positions * 2, frequencies)
    assert float((torch.einsum("bqhd,bkhd->bhqk", other(q), other(k)) - scores(0)).abs().max()) > 0.1


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("position", [1_000_000, 33_554_433])  # fp32 cannot tell the second from its neighbour
def test_a_million_tokens_away_the_angles_are_exact(position: int, theta: float) -> None:
    dim = 128
    turn = rotation(torch.tensor([[position]]), inverse_frequencies(dim, theta))
    assert turn.cosine.shape == turn.sine.shape == (1, 1, 1, dim // 2)
    for i in range(dim // 2):
        angle = position / theta ** (2 * i / dim)
        assert float(turn.cosine[0, 0, 0, i]) == pytest.approx(math.cos(angle), abs=1e-6)
        assert float(turn.sine[0, 0, 0, i]) == pytest.approx(math.sin(angle), abs=1e-6)


def test_each_slot_has_the_angle_of_its_own_position() -> None:
    """Documents that restart, and slots in any order: only the position's value counts."""
    frequencies = inverse_frequencies(8, 10_000.0)
    ascending = rotation(torch.arange(5)[None], frequencies)
    shuffled = torch.tensor([[0, 1, 2, 0, 1], [4, 3, 0, 2, 2]])
    turn = rotation(shuffled, frequencies)
    assert torch.equal(turn.cosine, ascending.cosine[0][shuffled])
    assert torch.equal(turn.sine, ascending.sine[0][shuffled])
    assert not torch.equal(turn.sine[0, 0], turn.sine[0, 1])


def test_turning_is_done_in_fp32_and_keeps_the_dtype() -> None:
    turn = rotation(torch.tensor([[12345]]), inverse_frequencies(16, 10_000.0))
    x = torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(1))
    narrow = turn(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, turn(x.bfloat16().float()).bfloat16())
    torch.testing.assert_close(turn(x).norm(dim=-1), x.norm(dim=-1))
