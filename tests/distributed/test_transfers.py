"""A rank that dies or hangs in the middle of a stage: the others end in time and say where they waited for whom."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from support.fate import VICTIM, End, Fate, ends

from farspan.parallel import transfers
from farspan.parallel.transfers import Transfer, Watch

WAITED = re.compile(
    r"rank (?P<rank>\d) waited (?P<seconds>[\d.]+) s in vain to (?P<peers>.+), posted at stage (?P<start>\d) and due at"
    r" stage (?P<stop>\d) of the (?P<direction>\w+) pass of plan (?P<plan>\w+); that rank died, hangs or is late: .+"
)


def told(fate: Fate, rank: int, words: str) -> re.Match[str]:
    found = WAITED.fullmatch(words)
    assert found is not None, words
    assert (int(found["rank"]), found["plan"]) == (rank, fate.plan)
    assert found["direction"] == ("backward" if fate.backward else "forward")
    return found


def told_by_all(fate: Fate, found: dict[int, End]) -> dict[int, re.Match[str]]:
    """What each of the others says. One at least waited for the victim; some may have waited for those that did."""
    assert sorted(found) == [rank for rank in range(fate.world) if rank != VICTIM]
    words = {rank: told(fate, rank, end.error) for rank, end in found.items()}
    assert any(f"rank {VICTIM}" in match["peers"] for match in words.values())
    assert max(end.seconds for end in found.values()) < 10
    return words


@pytest.mark.distributed
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("plan", "stage"), [("ring", 1), ("all_gather", 0)])
def test_a_rank_that_dies_ends_the_others_at_once(tmp_path: Path, plan: str, stage: int, backward: bool) -> None:
    fate = Fate(plan, backward, stage, signal.SIGKILL)
    told_by_all(fate, ends(fate, tmp_path))


@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_others_within_the_timeout(tmp_path: Path) -> None:
    fate = Fate("ring", False, 1, signal.SIGSTOP, timeout=3)
    words = told_by_all(fate, ends(fate, tmp_path))[2]
    assert (words["peers"], words["start"], words["stop"]) == (f"receive from rank {VICTIM}", "1", "2")
    assert 2 < float(words["seconds"]) < 10


@pytest.mark.distributed
def test_a_process_that_no_exception_can_reach_is_ended_by_the_watch(tmp_path: Path) -> None:
    """The main threads wait inside gloo, for 40 seconds; the watch finds a transfer late after two."""
    fate = Fate("ring", True, 1, signal.SIGSTOP, world=3, timeout=40, watched=True)
    found = ends(fate, tmp_path)
    assert sorted(found) == [0, 2]
    # The first to give up closes its connection to the other, which may see that sooner than its own watch looks.
    watched = {rank: end for rank, end in found.items() if end.code == 1}
    assert watched
    for rank, end in watched.items():
        (line,) = [line for line in end.stderr.splitlines() if "waited" in line]
        told(fate, rank, line[line.index("rank ", line.index("TransferError")) :])
        assert end.seconds < 10


class Faked(Transfer):
    """A transfer whose state the test says."""

    def __init__(self, over: bool = False, failed: bool = False, late: bool = False) -> None:
        super().__init__("ring", "forward", 0, 1)
        self.state = {"over": over, "failed": failed, "late": late}

    def over(self) -> bool:
        return self.state["over"]

    def failed(self) -> bool:
        return self.state["failed"]

    def late(self) -> bool:
        return self.state["late"]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(transfers, "_LOOK_SECONDS", 0.0)
    return Watch()


def test_the_watch_says_nothing_while_all_goes_well(watch: Watch) -> None:
    assert watch.look() is None
    for transfer in (Faked(over=True), Faked(over=True, late=True), Faked()):
        watch.add(transfer)
    assert watch.look() is None
    assert watch.look() is None


def test_the_watch_finds_the_oldest_that_is_late(watch: Watch) -> None:
    done, stuck, later = Faked(over=True, late=True), Faked(late=True), Faked(late=True)
    for transfer in (done, stuck, later):
        watch.add(transfer)
    assert watch.look() is stuck


def test_the_watch_finds_the_oldest_of_a_group_that_failed(watch: Watch) -> None:
    """NCCL calls all that was open over then."""
    first, second = Faked(over=True, failed=True), Faked(over=True, failed=True)
    watch.add(first)
    watch.add(second)
    assert watch.look() is first


def test_a_failure_that_is_known_only_after_the_look_is_not_lost(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = Faked(over=True)
    watch.add(transfer)
    monkeypatch.setattr(time, "sleep", lambda _: transfer.state.update(failed=True))
    assert watch.look() is transfer


def test_what_is_not_posted_yet_is_not_over() -> None:
    assert not Transfer("ring", "forward", 0, 1).over()
