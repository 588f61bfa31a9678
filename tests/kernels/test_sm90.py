"""What ptxas makes of the kernels for Hopper: compiled on any machine, with the tools that Triton brings along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import sm90 as script


@pytest.mark.parametrize("dim", [128, pytest.param(64, marks=pytest.mark.full)])
def test_kernels_compile_for_hopper_and_keep_the_matrix_units_busy(dim: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(script.__file__)), str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    # Head dim 128 has a one-pass shape for diagonals and one for the rest.
    assert len(reports) == (34 if dim == 128 else 32)
    for report in reports:
        print(report)
        # A block has 227 KiB of shared memory.
        assert report["shared_bytes"] <= 227 * 1024, report
        # Warpgroup products, of 16 along the head dim, issued without waiting for one another: ptxas says so when it
        # has to serialize them. Estimation has one product, attention several.
        assert report["products"] >= products(report["kernel"], dim), report
        assert not report["serialized"], report
        # Registers that do not fit go through memory. In the backward kernels for Hopper a few words do, around the
        # loops, in the forward ones and the portable dkdv some where tiles are tested, for that is seldom.
        assert report["spilled_bytes"] <= spill_limit(report["kernel"]), report


def products(kernel: str, dim: int) -> int:
    if kernel == f"portable dkdv {dim} columns":  # adds up what the kernel for columns made
        return 0
    return dim // 16 if kernel.startswith("estimate") else 8


def spill_limit(kernel: str) -> int:
    if kernel.startswith("hopper"):
        return 40 if "forward" not in kernel else 40 if "dense" in kernel else 400
    if "column scores" in kernel:  # twice as many warps would not spill, and take 1.3 times as long
        return 80
    return 400 if "dkdv" in kernel else 0
