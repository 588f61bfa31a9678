"""Rates between what was measured, and the table that is shipped."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from farspan.kernels import masks, rates
from farspan.kernels.backends import BACKENDS
from farspan.kernels.cost import Work, call_seconds
from farspan.kernels.problem import Problem
from farspan.kernels.rates import Rates

TABLE = Rates(
    "sm_90",
    "a GPU",
    "1",
    "1",
    {
        "triton forward causal 64": [(1024, 100.0), (4096, 300.0)],
        "triton forward causal 128": [(1024, 200.0), (4096, 400.0)],
        "triton forward lists 128": [(1024, 150.0)],
    },
)


@pytest.mark.parametrize(("length", "rate"), [(256, 50), (1024, 200), (2048, 300), (4096, 400), (1 << 20, 400)])
def test_between_and_beyond_the_lengths_measured(length: int, rate: float) -> None:
    """A short problem does not fill the GPU: its rate falls with its length."""
    assert TABLE.rate("triton", "causal", False, length, 128) == pytest.approx(rate)


def test_the_nearest_head_dim_counts() -> None:
    assert [TABLE.rate("triton", "causal", False, 4096, dim) for dim in (32, 80, 96, 256)] == [300, 300, 400, 400]


def test_what_was_not_measured() -> None:
    assert TABLE.rate("cudnn", "causal", False, 4096, 128) == 0
    assert TABLE.rate("triton", "lists", False, 1024, 128) == 150
    unmeasured = Rates("", "", "", "", {key: TABLE.points[key] for key in TABLE.points if "lists" not in key})
    assert unmeasured.rate("triton", "lists", False, 1024, 128) == 200
    work = Work("full", 4096, 4096, 4096**2, 4096)
    assert call_seconds(TABLE, problem(4096), "triton", work, "make") == math.inf


def test_seconds_are_flops_by_rate_and_bytes_that_are_added() -> None:
    given = problem(4096)
    work = Work.of_mask(masks.causal(4096), given)
    assert (work.kind, work.length, work.pairs) == ("causal", 4096, 2 * 4096 * 4097 // 2)
    alone = call_seconds(TABLE, given, "triton", work, "make")
    assert alone == pytest.approx(4 * 128 * 32 * work.pairs / 400e12, rel=0.05)
    added = call_seconds(TABLE, given, "triton", work, "add")
    assert added - alone == pytest.approx(2 * 4096 * 32 * 128 * 6 / 4e12)


def test_lists_are_looked_up_by_the_keys_that_a_row_sees() -> None:
    documents = masks.causal(4096, range(0, 4097, 256))
    assert Work.of_mask(documents, problem(4096)).length == pytest.approx(257)
    assert Work.of_mask(masks.sliding_window(4096, 128), problem(4096)).length == pytest.approx(256, rel=0.05)
    sees = torch.arange(4096) < 256
    few = type(documents)(*(bound * sees for bound in documents.bounds))
    assert Work.of_mask(few, problem(4096)).length == pytest.approx(257)


def test_the_shipped_tables_are_of_known_backends_and_in_order() -> None:
    table = rates.of_capability((9, 0))
    assert table.name == "sm_90"
    assert {"triton", "cudnn"} <= table.backends <= set(BACKENDS)
    for key, points in table.points.items():
        _, direction, kind, dim = key.split()
        assert direction in ("forward", "backward")
        assert kind in ("causal", "full", "lists")
        assert int(dim) > 0
        assert points == sorted(points)
        assert all(0 < rate < 5000 for _, rate in points)
        if kind == "lists":  # a rate that grows faster than the length tells of launches, not of attention
            assert all(fast / slow <= high / low for (low, slow), (high, fast) in pairwise(points)), key


def test_another_gpu_reads_the_nearest_table() -> None:
    assert rates.of_capability((8, 0)) is rates.of_capability((9, 0))


def problem(keys: int) -> Problem:
    return Problem(2, keys, 32, 8, 128, 128, torch.float16, (9, 0))
