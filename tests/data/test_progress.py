import io

import numpy as np
import pytest

from farspan.data import progress
from farspan.data.histogram import Histogram
from farspan.data.progress import Progress
from farspan.data.statistics import describe_lengths


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_ten_seconds_with_rate_and_time_left(clock: list[float]) -> None:
    lines: list[str] = []
    shown = Progress("encoding", 100_000_000, lines.append, done=40_000_000)
    for _ in range(25):
        clock[0] += 1
        shown.add(1_000_000)
    shown.end()
    assert lines == [
        "encoding 50.0 of 100.0 MB (50%), 1.0 MB/s, 0:00:50 left",
        "encoding 60.0 of 100.0 MB (60%), 1.0 MB/s, 0:00:40 left",
    ]


def test_a_terminal_gets_a_bar_on_one_line(clock: list[float]) -> None:
    terminal, lines = io.StringIO(), list[str]()
    shown = Progress("encoding", 10_000_000, lines.append, terminal)
    for _ in range(4):
        clock[0] += 0.5
        shown.reach(5_000_000, 1000)
    shown.reach(10_000_000)
    shown.end()
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1
    assert (
        "[###############...............] encoding 5.0 of 10.0 MB (50%), 2.5 MB/s, 2,000 tokens/s, 0:00:02 left"
        in drawn
    )
    assert drawn.splitlines()[-1].split("\r")[-1].startswith("[##############################] encoding 10.0 of 10.0")
    assert not lines


def test_what_is_soon_done_draws_nothing(clock: list[float]) -> None:
    terminal = io.StringIO()
    shown = Progress("reading", 10, print, terminal)
    shown.add(10)
    shown.end()
    assert terminal.getvalue() == ""


def test_a_histogram_counts_every_document_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 1023, 1024, 2**31 - 1])
    found = Histogram.of(lengths)
    assert found.documents.sum() == len(lengths)
    assert found.tokens.sum() == lengths.sum()
    assert found.as_json()[:4] == [
        {"from": 1, "documents": 1, "tokens": 1},
        {"from": 2, "documents": 2, "tokens": 5},
        {"from": 4, "documents": 2, "tokens": 11},
        {"from": 8, "documents": 1, "tokens": 8},
    ]
    monkeypatch.setattr("farspan.data.histogram._AT_ONCE", 2)
    assert Histogram.of(lengths).as_json() == found.as_json()
    assert Histogram.of(lengths[:0]).lines() == ["no documents"]


def test_statistics_of_known_lengths() -> None:
    lengths = np.array([100, 257, 256, 8193, 10_000])
    lines = [" ".join(line.split()) for line in describe_lengths(lengths, slice(None), 256, 8192, False, 0)]
    assert "50% 257 10,000" in lines
    assert "100% 10,000 10,000" in lines
    buckets = lines[lines.index("bucket sequences tokens share") + 1 :]
    # 257 is [256]; 8193 is [8192]; 10000 is [8192, 1024, 512, 256]
    assert buckets[:-1] == [
        "256 2 512 2.7%",
        "512 1 512 2.7%",
        "1,024 1 1,024 5.4%",
        "2,048 0 0 0.0%",
        "4,096 0 0 0.0%",
        "8,192 2 16,384 87.1%",
    ]
    assert buckets[-1].endswith("(with 2 documents of less than 257 tokens)")
    assert list(describe_lengths(lengths[:0], slice(None), 256, 8192, False, 0)) == ["no documents"]
