"""The shipped table is what the benchmark writes, so that measuring anew changes figures alone."""

from __future__ import annotations

import json
from importlib.resources import files

from rates import dump


def test_the_table_is_written_as_it_was() -> None:
    text = files("farspan.kernels").joinpath("rates.json").read_text()
    assert dump(json.loads(text)) == text
