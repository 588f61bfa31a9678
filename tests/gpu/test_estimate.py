"""The whole estimation on a GPU, in bf16: against dense fp64 softmax, twice the same bits, and nothing waited for."""

from __future__ import annotations

import pytest
import torch
from support.planted import covered, masses, planted

from farspan.kernels import masks
from farspan.kernels.estimate import VerticalSlash
from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel import orders
from farspan.parallel.estimate import Estimator

pytestmark = pytest.mark.gpu

LENGTH = 4000


@pytest.mark.parametrize("packed", [False, True])
def test_an_index_covers_its_mass_and_is_found_without_waiting(packed: bool) -> None:
    mask = masks.causal(LENGTH, [0, 1000, 1033, LENGTH]) if packed else masks.causal(LENGTH)
    settings = VerticalSlash(segments=2, documents=3, mass=0.95) if packed else VerticalSlash()
    q, k = planted(LENGTH, (8, 2), tuple(range(1100, 3000, 100)), (300, 901), 14.0, 2, torch.bfloat16)
    estimator = Estimator(orders.contiguous(LENGTH, 1), mask, settings, 0, None, "cuda")
    on_gpu = (q.cuda(), k.cuda())
    first, share = estimator(*on_gpu)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second, _ = estimator(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(getattr(first, x), getattr(second, x)) for x in ("diagonals", "columns"))
    index = VerticalSlashIndex(first.diagonals.cpu(), first.columns.cpu(), LENGTH)
    whole = slice(0, LENGTH)
    weights, positions = masses(q, k, mask.visible(whole, whole).tril(), settings, mask)
    measured = covered(weights, positions, index)
    assert float((measured - share.cpu()).abs().max()) < 1e-3
    assert float(measured.min()) >= settings.mass - 1e-3
