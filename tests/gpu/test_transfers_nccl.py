"""A rank that dies or hangs in the middle of a stage over NCCL: the watch of the other ends it, and names the stage."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.fate import Fate, ends


@pytest.mark.multigpu
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_other_rank_ends_before_torch_aborts_it(tmp_path: Path, by: signal.Signals, backward: bool) -> None:
    end = ends(Fate("ring", backward, 0, by, world=2, timeout=20, cuda=True), tmp_path)[0]
    direction = "backward" if backward else "forward"
    print(f"{end.seconds:.1f} s, exit code {end.code}: {end.stderr[-500:]}")
    assert end.code == 1
    assert f"stage 0 and due at stage 1 of the {direction} pass of plan ring" in end.stderr
    assert "rank 1" in end.stderr
    assert end.seconds < 30
