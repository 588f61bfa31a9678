import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from farspan.data.encoding import encode_portions
from farspan.data.errors import DataError


def test_order_is_kept_and_reading_does_not_run_ahead_of_encoding() -> None:
    taken = []

    def naps() -> Iterator[Any]:
        for number in range(12):
            taken.append(number)
            yield 0.05 if number % 3 == 0 else 0.0

    ahead = []
    sleep: Any = time.sleep  # what takes its time, instead of an encoder
    for number, (nap, _) in enumerate(encode_portions(naps(), sleep, processes=2)):
        assert nap == (0.05 if number % 3 == 0 else 0.0)
        ahead.append(len(taken) - number)
    assert len(ahead) == 12
    assert max(ahead) <= 2 * 2 + 1


def test_a_process_that_dies_is_an_error_and_no_hang() -> None:
    die: Any = os._exit
    portions: Any = iter([1, 1, 1])
    with pytest.raises(DataError, match=r"was killed, perhaps for want of memory: lower data\.processes"):
        list(encode_portions(portions, die, processes=2))


def test_an_error_of_an_encoder_comes_through() -> None:
    parse: Any = int
    portions: Any = iter(["1", "no number"])
    with pytest.raises(ValueError, match="no number"):
        list(encode_portions(portions, parse, processes=2))
