"""Estimation on one device, against dense fp64 softmax and the rules of choice as they are defined."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from support.oracle import mask_cases
from support.planted import covered, masses, planted
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.kernels.estimate import Budgets, Probes, VerticalSlash, probe_positions, reference, vertical_slash
from farspan.kernels.estimate.select import ranked
from farspan.kernels.estimate.units import PLACE_BITS, mass_bits
from farspan.kernels.index import VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.kernels.triton.estimate import launch
from farspan.parallel import orders

LENGTH = 1000
CU = [0, 300, 301, 340, 700, LENGTH]
COLUMNS, OFFSETS = (40, 200, 205, 333, 411), (300, 641)
EVERYWHERE = VerticalSlash(segments=2, documents=3, sinks=4, local_blocks=1)


def estimate(
    q: Tensor, k: Tensor, mask: IntervalMask, settings: VerticalSlash, budgets: Budgets | None = None
) -> tuple[VerticalSlashIndex, Tensor]:
    positions = probe_positions(mask, settings)
    probes = Probes.of(positions, mask, np.arange(mask.rows), q.device)
    rows = torch.from_numpy(positions).flatten(1).clamp(max=mask.rows - 1).to(q.device)
    queries = q[torch.arange(q.shape[0])[:, None], rows].transpose(1, 2)
    return vertical_slash(queries, k, torch.arange(mask.rows, device=q.device), probes, settings, budgets=budgets)


def allowed(mask: IntervalMask) -> Tensor:
    whole = slice(0, mask.rows)
    return mask.visible(whole, whole).tril()


CASES = {
    "columns": (masks.causal(LENGTH), COLUMNS, (), VerticalSlash()),
    "diagonals": (masks.causal(LENGTH), (), OFFSETS, VerticalSlash()),
    "both": (masks.causal(LENGTH), COLUMNS, OFFSETS, VerticalSlash(mass=0.95)),
    "noise": (masks.causal(LENGTH), (), (), VerticalSlash()),
    "documents": (masks.causal(LENGTH, CU), (320, 400, 710), (200,), EVERYWHERE),
    "window": (masks.sliding_window(LENGTH, 500, 4), (40, 700), (300,), EVERYWHERE),
}


@pytest.mark.parametrize("strength", [14.0, 5.0])
@pytest.mark.parametrize("name", CASES)
def test_mass_is_covered_by_no_more_than_it_takes(name: str, strength: float) -> None:
    mask, columns, offsets, settings = CASES[name]
    q, k = planted(LENGTH, (3, 1), columns, offsets, strength, batch=2 if name == "both" else 1)
    index, claimed = estimate(q, k, mask, settings)
    weights, positions = masses(q, k, allowed(mask), settings, mask)
    measured = covered(weights, positions, index)
    assert float((measured - claimed).abs().max()) < 1e-5
    assert float(measured.min()) >= settings.mass - 1e-5
    scores, always = column_rule(weights, positions, settings, mask)
    total = weights.sum((2, 3))
    target = torch.minimum(scores.sum(-1) * settings.mass, settings.mass * total - always)
    found = torch.zeros(*scores.shape[:2], LENGTH + 1, dtype=torch.bool)
    found.scatter_(2, index.columns.long(), True)
    found[..., : settings.sinks] = False
    for b, h in np.ndindex(*total.shape):
        chosen = scores[b, h][found[b, h, :LENGTH]].sort().values
        if len(chosen):
            assert float(chosen.sum() - chosen[0]) < float(target[b, h]) + 1e-4
            assert float(chosen[0]) >= float(scores[b, h][~found[b, h, :LENGTH]].max()) - 1e-4
        assert float(chosen.sum()) >= float(target[b, h]) - 1e-4
        diagonals = index.diagonals[b, h].nonzero().flatten().tolist()
        least = [measured_without(weights, positions, index, b, h, d) for d in diagonals[settings.local_blocks :]]
        assert not least or max(least) < settings.mass + 1e-5


def measured_without(
    weights: Tensor, positions: Tensor, index: VerticalSlashIndex, b: int, h: int, diagonal: int
) -> float:
    """What is covered in one head without one of its diagonals."""
    less = index.diagonals[b : b + 1, h : h + 1].clone()
    less[..., diagonal] = False
    only = VerticalSlashIndex(less, index.columns[b : b + 1, h : h + 1], index.length)
    rows = positions[b : b + 1] if len(positions) > 1 else positions
    return float(covered(weights[b : b + 1, h : h + 1], rows, only))


def column_rule(
    weights: Tensor, positions: Tensor, settings: VerticalSlash, mask: IntervalMask
) -> tuple[Tensor, Tensor]:
    """By definition, fp64: each column's score `[B, H, length]`, and what is always computed `[B, H]`."""
    key = torch.arange(mask.rows)
    near = positions[..., None] // TILE - key // TILE < settings.local_blocks
    always = (near | (key < settings.sinks))[:, None]
    left = torch.where(always, 0, weights).unflatten(2, (-1, 4, settings.probes // 4))  # sets, quarters, rows
    quarters = left.sum(4)
    tiles = torch.nn.functional.pad(quarters.sum(3), (0, -mask.rows % TILE)).unflatten(3, (-1, TILE)).sum(-1)
    least = 4 * quarters.amin(3)
    stands_out = least >= tiles.repeat_interleave(TILE, 3)[..., : mask.rows] * 4 / TILE
    return torch.where(stands_out, least, 0).sum(2), torch.where(always, weights, 0).sum((2, 3))


def test_planted_columns_and_diagonals_are_found_and_nothing_else() -> None:
    q, k = planted(LENGTH, (2, 1), COLUMNS, OFFSETS, 20.0)
    index, _ = estimate(q, k, masks.causal(LENGTH), VerticalSlash(sinks=0))
    for head in range(2):
        assert set(index.columns[0, head].tolist()) == {*COLUMNS, LENGTH}
        # What is 300 and 641 tokens before the probes is 2 and 5 blocks before them, but for 4 probes.
        assert index.diagonals[0, head].nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_budgets_take_the_strongest_whatever_their_mass() -> None:
    q, k = planted(LENGTH, (2, 1), COLUMNS, OFFSETS, 14.0)
    budgets = Budgets(torch.tensor([3, 0]), torch.tensor([0, 2]))
    settings = VerticalSlash(mass=0.01, sinks=0, local_blocks=1)
    index, _ = estimate(q, k, masks.causal(LENGTH), settings, budgets)
    assert index.column_counts().tolist() == [[3, 0]]
    assert set(index.columns[0, 0, :3].tolist()) < set(COLUMNS)
    assert index.diagonals[0].sum(-1).tolist() == [1, 3]
    assert set(index.diagonals[0, 1].nonzero().flatten().tolist()) <= {0, 1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("width", [1, 40, 96])
def test_a_band_is_left_to_diagonals_however_wide(width: int) -> None:
    """The probes alone see columns in it, no other rows do."""
    code = torch.nn.functional.normalize(
        torch.randn(1, LENGTH, 1, 256, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    q = torch.zeros_like(code)
    for offset in range(400, 400 + width):
        q[:, offset:] += code[:, : LENGTH - offset] * 14
    index, _ = estimate(q, code * 16, masks.causal(LENGTH), VerticalSlash())
    assert index.column_counts().tolist() == [[30]]
    assert set(index.diagonals[0, 0].nonzero().flatten().tolist()) <= {0, 1, 3, 4}


def test_the_minimum_is_there_when_the_caps_are_exhausted() -> None:
    q, k = planted(LENGTH, (2, 1), COLUMNS, OFFSETS, 4.0)
    settings = VerticalSlash(mass=1.0, most_columns=1, most_diagonals=1)
    index, share = estimate(q, k, masks.causal(LENGTH), settings)
    assert bool(index.diagonals[..., :2].all())
    assert bool((index.diagonals.sum(-1) == 3).all())
    assert bool((index.columns[..., :30] == torch.arange(30)).all())
    assert index.columns.shape == (1, 2, 31)
    assert bool(index.to_dense().any(-1).all())
    assert bool((share < 1).all())


@pytest.mark.parametrize("mask_name", ["full", "prefix"])
def test_keys_after_a_probe_never_decide(mask_name: str) -> None:
    """Whatever the mask lets a probe see: the pattern is causal."""
    case = next(case for case in mask_cases(300) if case.name == mask_name)
    settings = VerticalSlash(segments=3, sinks=0)
    q, k = planted(300, (2, 1), (100, 150), (), 8.0)
    index, share = estimate(q, k, case.mask, settings)
    weights, positions = masses(q, k, case.allowed.tril(), settings, case.mask)
    assert float((covered(weights, positions, index) - share).abs().max()) < 1e-5


def test_probes_that_see_nothing() -> None:
    mask = IntervalMask(*(bound * (torch.arange(300) < 100) for bound in masks.causal(300).bounds))
    q, k = planted(300, (2, 1), (50,), (), 8.0)
    index, share = estimate(q, k, mask, VerticalSlash())
    assert bool((share == 1).all())
    assert index.column_counts().tolist() == [[30, 30]]
    assert index.diagonals.sum(-1).tolist() == [[2, 2]]


@pytest.mark.parametrize("length", [1, 5, 63, 128, 129])
def test_rows_shorter_than_the_probes(length: int) -> None:
    q, k = planted(length, (2, 1), (), (), 8.0)
    index, share = estimate(q, k, masks.causal(length), VerticalSlash(segments=3))
    assert bool(index.to_dense().any(-1).all())
    assert bool((share >= 0.9).all())


def test_a_short_document_at_the_end_does_not_choose_for_the_long_one_before_it() -> None:
    q, k = planted(LENGTH, (2, 1), (), (640,), 20.0)
    mask = masks.causal(LENGTH, [0, 900, LENGTH])
    index, _ = estimate(q, k, mask, VerticalSlash())
    assert bool(index.diagonals[..., 5].all())
    index, _ = estimate(q, k, mask, VerticalSlash(documents=0))
    assert not index.diagonals[..., 2:].any()


def test_probe_positions_are_the_last_of_their_part() -> None:
    mask = masks.stack([masks.causal(LENGTH, CU), masks.causal(LENGTH)])
    positions = probe_positions(mask, VerticalSlash(probes=16, segments=2, documents=4))
    assert positions.shape == (2, 5, 16)
    ends = [340, 500, 700, 300, LENGTH]
    for row, end in zip(positions[0], sorted(ends), strict=True):
        assert row.tolist() == list(range(end - 16, end))
    assert positions[1, :2, -1].tolist() == [499, 999]
    assert bool((positions[1, 2:] == LENGTH).all())
    short = probe_positions(masks.causal(LENGTH, CU), VerticalSlash(documents=5))
    assert short[0, 1].tolist() == [LENGTH] * 63 + [300]
    assert short[0, 2, -39:].tolist() == list(range(301, 340))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_second_estimate_has_the_same_bits(dtype: torch.dtype) -> None:
    q, k = planted(LENGTH, (4, 2), COLUMNS, OFFSETS, 6.0, dtype=dtype)
    first, second = (estimate(q, k, masks.causal(LENGTH), VerticalSlash()) for _ in range(2))
    pairs = zip(
        (first[0].diagonals, first[0].columns, first[1]),
        (second[0].diagonals, second[0].columns, second[1]),
        strict=True,
    )
    assert all(torch.equal(x, y) for x, y in pairs)


def test_settings_and_shapes_that_do_not_fit_are_refused() -> None:
    for name, value in {"mass": 0.0, "probes": 60, "segments": 0, "local_blocks": 0, "most_columns": 0}.items():
        with pytest.raises(ValueError, match=f"attention.sparse.{name}"):
            VerticalSlash(**{name: value})
    q, k = planted(300, (2, 1))
    mask = masks.causal(300)
    probes = Probes.of(probe_positions(mask, VerticalSlash()), mask, np.arange(300))
    with pytest.raises(ValueError, match="probes q must be"):
        vertical_slash(q.transpose(1, 2), k, torch.arange(300), probes, VerticalSlash())
    with pytest.raises(ValueError, match=r"set parallel.order to striped"):
        Probes.of(probe_positions(mask, VerticalSlash()), mask, orders.striped(300, 2, 16).positions[0])


# The Triton passes: in the interpreter here, where bf16 is wrong.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def passes(module: ModuleType, q: Tensor, k: Tensor, probes: Probes, lse: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    given, bits = (q, k, probes, q.shape[3] ** -0.5), mass_bits(probes.rows)
    weights = module.row_weights(*given)
    candidates, sums = module.column_scores(*given, lse, bits, EVERYWHERE)
    positions = (probes.k_blocks[:, None] * TILE + torch.arange(TILE, device=q.device)).flatten()[: probes.keys]
    scores = candidates >> PLACE_BITS
    assert torch.equal(candidates, ranked(scores, positions))
    return *weights, scores, sums, module.diagonal_masses(*given, lse, bits, EVERYWHERE, chosen)


def base_2_lse(q: Tensor, k: Tensor, probes: Probes) -> Tensor:
    whole = slice(0, probes.keys)
    seen = probes.visible.visible(slice(0, probes.rows), whole)[:, None]
    keys = k.double().transpose(1, 2).repeat_interleave(q.shape[1] // k.shape[2], 1)
    scores = (q.double() @ keys.transpose(-1, -2) / q.shape[3] ** 0.5).masked_fill(~seen, float("-inf"))
    return (scores.logsumexp(-1) / math.log(2)).nan_to_num(neginf=0).float()


@pytest.mark.parametrize(("mask_name", "dtype"), [("packed", torch.float32), ("causal", torch.float16)])
def test_triton_passes_equal_the_reference_and_do_not_depend_on_the_other_keys(
    mask_name: str, dtype: torch.dtype
) -> None:
    length, heads = 300, (4, 2)
    mask = masks.causal(length)
    if mask_name == "packed":
        mask = masks.stack([masks.causal(length, [0, 100, 110, length]), masks.sliding_window(length, 90, 3)])
    q, k = (x.to(DEVICE) for x in planted(length, heads, (50, 133), (60,), 6.0, mask.batch, dtype))
    positions = probe_positions(mask, EVERYWHERE)
    rows = torch.from_numpy(positions).flatten(1).clamp(max=length - 1).to(DEVICE)
    queries = q[torch.arange(len(q))[:, None], rows].transpose(1, 2).contiguous()
    chosen = torch.rand(len(q), heads[0], length, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    whole = Probes.of(positions, mask, np.arange(length), DEVICE)
    lse = base_2_lse(queries, k, whole)
    got = passes(launch, queries, k, whole, lse, chosen)
    wanted = passes(reference, queries, k, whole, lse, chosen)
    log = [exponents + sums.double().log2() for exponents, sums in (got[:2], wanted[:2])]
    assert float((log[0] - log[1]).nan_to_num(0, 0, 0).abs().max()) < 1e-3
    for x, y in zip(got[3:], wanted[3:], strict=True):
        assert float((x - y).double().norm()) <= 1e-4 * float(y.double().norm())
    stand_out_the_same = (got[2] > 0) == (wanted[2] > 0)
    assert float(stand_out_the_same.double().mean()) > 0.99
    assert float(((got[2] - wanted[2]) * stand_out_the_same).double().norm()) <= 1e-4 * float(wanted[2].double().norm())
    held = np.r_[0:128, 256:300]
    part = Probes.of(positions, mask, held, DEVICE)
    few = passes(launch, queries, k[:, held], part, lse, chosen[..., held])
    assert torch.equal(few[0], got[0][:, :, [0, 2]])
    assert torch.equal(few[1], got[1][:, :, [0, 2]])
    assert torch.equal(few[2], got[2][..., held])
    assert torch.equal(few[4], got[4][..., [0, 2]])


def test_an_index_by_the_triton_passes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = planted(512, (4, 2), (40, 200), (300,), 14.0)
    wanted, share = estimate(q, k, masks.causal(512), VerticalSlash())
    monkeypatch.setattr(sys.modules[vertical_slash.__module__], "reference", launch)  # which a GPU takes anyway
    got, triton_share = estimate(q.to(DEVICE), k.to(DEVICE), masks.causal(512), VerticalSlash())
    assert all(torch.equal(getattr(got, x).cpu(), getattr(wanted, x)) for x in ("diagonals", "columns"))
    assert float((share - triton_share.cpu()).abs().max()) < 1e-5
