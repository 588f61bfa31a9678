"""The shipped table is what the benchmark writes, so that measuring anew changes figures alone."""

from __future__ import annotations

import json
from importlib.resources import files

from rates import busy, dump


def test_the_table_is_written_as_it_was() -> None:
    text = files("farspan.kernels").joinpath("rates.json").read_text()
    assert dump(json.loads(text)) == text


def test_points_that_launches_took_are_left_out() -> None:
    """A row of short documents keeps a GPU busy, so that its rate grows with their length at the most."""
    honest = [(256, 70.0), (512, 140.0), (1024, 200.0)]
    assert busy([(64, 1.0), (128, 4.0), *honest]) == honest == busy(honest)
    assert busy([(64, 18.0), (128, 34.0), *honest]) == honest
    assert busy(honest[:1]) == honest[:1]
