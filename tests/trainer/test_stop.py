"""A signal becomes a request; all ranks follow it at the same step; forked children are left as they were."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.trainer.stop import StopRequest

RANK = """
import os, signal, sys, time
import torch.distributed as dist
from farspan.trainer.stop import StopRequest

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
with StopRequest() as stop:
    for step in range(5):
        if (rank, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)
        if stop.agree(dist.group.WORLD):
            break
print(step, stop.requested, stop.signal_name)
"""

PARENT = """
import os, signal, time
from farspan.trainer.stop import StopRequest

with StopRequest() as stop:
    child = os.fork()
    if child == 0:
        time.sleep(60)
    os.kill(child, signal.SIGINT)
    time.sleep(0.2)
    print("alive" if os.waitpid(child, os.WNOHANG) == (0, 0) else "dead")
    os.kill(child, signal.SIGTERM)
    print("terminated" if os.waitpid(child, 0)[1] == signal.SIGTERM else "ended otherwise")
    print(stop.requested)
"""


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_first_signal_is_noted_and_further_ones_change_nothing(name):
    before = handlers()
    with StopRequest() as stop:
        assert (stop.requested, stop.signal_name, stop.agree(None)) == (False, None, False)
        os.kill(os.getpid(), signal.Signals[name])
        assert (stop.requested, stop.signal_name, stop.agree(None)) == (True, name, True)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == name
        assert handlers() != before
    assert handlers() == before


def test_handlers_return_after_an_error():
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0
    assert handlers() == before


def test_signal_on_one_rank_stops_all_at_the_same_step(tmp_path: Path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=30)[0] for rank in ranks] == ["3 True SIGINT\n", "3 True SIGINT\n"]


def test_forked_child_can_be_terminated_and_ignores_the_terminal():
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=30)
    assert parent.stdout.split() == ["alive", "terminated", "False"], parent.stderr
