"""`farspan train` as a user runs it: resuming after kill -9, stopping on a signal, refusing a second writer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.corpus import prepare_small

from farspan.data.corpus import Corpus
from farspan.data.prepared import load_prepared

pytestmark = pytest.mark.distributed

STEPS, EVERY = 10, 5


class Run:
    """A run directory, and the commands that train in it."""

    def __init__(self, directory: Path, prepared: Path, zero: int = 1) -> None:
        self.directory = directory
        self.config = directory.with_suffix(".yaml")
        tree = {
            "run": {"dir": str(directory), "seed": 7},
            "launch": {"processes": 2},
            "model": {
                "hidden_size": 64,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 16,
                "feed_forward_size": 128,
                "tied_embeddings": True,
            },
            "data": {"sources": ["unused"], "directory": str(prepared)},
            "train": {"steps": STEPS, "sequence_length": 255, "tokens_per_step": 510, "dtype": "fp32"},
            "parallel": {"context": 2, "zero_stage": zero},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3},
            "eval": {"every": 4, "rows": 2},
            "checkpoint": {"every": EVERY, "keep": 2},
        }
        self.config.write_text(yaml.safe_dump(tree))

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "farspan.launch.command", "train", str(self.config), *overrides]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def train(self, *overrides: str, code: int = 0) -> tuple[str, str]:
        process = self.start(*overrides)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def rows(self) -> list[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "checkpoints").iterdir())

    def values(self) -> list[tuple[Any, ...]]:
        """What must be the same to the last digit, whatever happened to the run meanwhile."""
        return [
            (r["step"], r["loss"], r["grad_norm"], r["tokens"], r["learning_rate"], r.get("eval_loss"))
            for r in self.rows()
        ]


def workers_of(launcher: int) -> list[int]:
    """Process ids of the launcher's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == launcher:
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def kill_launcher(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher alone; its workers must be gone within seconds."""
    workers = workers_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Run:
    """Ten steps without a break, ZeRO 1."""
    run = Run(tmp_path_factory.mktemp("straight") / "run", prepared)
    out, _ = run.train()
    assert "the run is complete: 10 of 10 steps" in out
    (line,) = (line for line in out.splitlines() if line.startswith("attention of the first batch: "))
    assert "128 x 128: forward " in line
    return run


def test_a_run_leaves_what_a_user_looks_for(straight: Run) -> None:
    rows = straight.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {"step", "loss", "tokens", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second"}
    assert all(names | {"sequence_length"} <= set(row) for row in rows)
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 10]
    assert straight.checkpoints() == ["step_00000005", "step_00000010"]
    assert (straight.directory / "checkpoints/step_00000010/manifest.json").exists()
    assert list((straight.directory / "tensorboard").iterdir())
    out, _ = straight.train()  # again: nothing to do, and nothing breaks
    assert "the run is complete: 10 of 10 steps" in out
    assert straight.rows() == rows


@pytest.mark.full
def test_a_complete_run_starts_again_where_its_blend_has_no_more_rows(tmp_path: Path, prepared: Path) -> None:
    documents = load_prepared(prepared).sources["text"]["train"]
    rows = int(Corpus(load_prepared(prepared), "train").lengths[documents.start : documents.stop].sum()) // 255
    run = Run(tmp_path / "run", prepared)
    step = ("train.steps=1", f"data.blend.parts={{text: {{epochs: {2.5 / rows}}}}}", "launch.processes=1")
    for _ in range(2):
        out, _ = run.train(*step, "parallel.context=1")
        assert "the run is complete: 1 of 1 steps" in out


def _killed_run_goes_on(run: Run) -> None:
    process = run.start()
    wait_for(lambda: len(run.rows()) >= EVERY + 2)
    kill_launcher(process)
    assert "step_00000005" in run.checkpoints()
    out, _ = run.train()
    assert "resumed from" in out


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, prepared: Path, straight: Run) -> None:
    run = Run(tmp_path / "run", prepared)
    _killed_run_goes_on(run)
    assert run.values() == straight.values()


@pytest.mark.full
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_every_zero_stage_goes_on_bit_for_bit(tmp_path: Path, prepared: Path, zero: int) -> None:
    straight, run = Run(tmp_path / "straight", prepared, zero), Run(tmp_path / "run", prepared, zero)
    straight.train()
    _killed_run_goes_on(run)
    assert run.values() == straight.values()


@pytest.mark.full
def test_a_kill_during_a_save_and_a_flipped_byte_cost_only_steps(tmp_path: Path, prepared: Path, straight: Run) -> None:
    run = Run(tmp_path / "run", prepared)
    checkpoints = run.directory / "checkpoints"
    process = run.start("checkpoint.every=3")
    wait_for((checkpoints / "step_00000006.tmp").exists)
    kill_launcher(process)
    # Killed this early, step 6 is a half written .tmp; a machine fast enough may just have completed it.
    assert run.checkpoints() in (["step_00000003", "step_00000006.tmp"], ["step_00000003", "step_00000006"])
    run.train("train.steps=9", "checkpoint.every=3", "optimizer.schedule=constant", code=0)
    assert run.checkpoints() == ["step_00000006", "step_00000009"]
    damaged = next((checkpoints / "step_00000009").rglob("*model_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    out, err = run.train()
    assert "step_00000009.damaged" in run.checkpoints()
    assert "resumed from" in out
    assert "step_00000006 at step 6" in out
    assert damaged.name in err
    # Step 6 was reached by the cosine schedule or by the constant one, depending on where the kill fell; steps up to 3
    # are those of the straight run, and no row is missing or doubled.
    assert run.values()[:3] == straight.values()[:3]
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.full), signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, prepared: Path, number: signal.Signals
) -> None:
    run = Run(tmp_path / "run", prepared)
    endless = ("train.steps=100000", "optimizer.schedule=constant", "eval.every=0", "checkpoint.every=100000")
    process = run.start(*endless)
    wait_for(lambda: len(run.rows()) >= 2)
    _, err = run.train(code=2)  # a second writer meanwhile
    assert "is in use by process" in err
    assert len(err.strip().splitlines()) == 1
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    done = len(run.rows())
    assert f"stopped as asked after step {done} of 100000; run again to go on" in out
    assert run.checkpoints() == [f"step_{done:08d}"]
    if number == signal.SIGTERM:
        run.train(*endless[1:], f"train.steps={done + 1}")
        assert [row["step"] for row in run.rows()] == list(range(1, done + 2))


@pytest.mark.full
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, prepared: Path) -> None:
    run = Run(tmp_path / "run", prepared)
    run.train("train.steps=5")
    before = {path: path.read_bytes() for path in (run.directory / "checkpoints").rglob("*") if path.is_file()}
    _, err = run.train("optimizer.learning_rate=1e30", "optimizer.gradient_clipping=0", code=1)
    assert "NonFiniteError: step 7" in err
    assert "its samples are 12 to 13" in err
    assert err.count("Traceback") == 1
    after = {path: path.read_bytes() for path in (run.directory / "checkpoints").rglob("*") if path.is_file()}
    assert after == before


def test_a_rank_killed_in_the_middle_of_a_stage_ends_the_run(tmp_path: Path, prepared: Path) -> None:
    run, logs = Run(tmp_path / "run", prepared), tmp_path / "logs"
    workers = Path(__file__).parent / "workers"
    command = [sys.executable, "launcher.py", str(logs), "2", "60", "dying", str(run.config)]
    done = subprocess.run(command, cwd=workers, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Rank 1 was ended by SIGKILL")
    assert [row["step"] for row in run.rows()] == [1]
    (seen,) = logs.glob("*/rank_0.stderr.log")
    words = r"TransferError: rank 0 waited .* rank 1, .* stage 1 of the backward pass of plan ring; that rank died"
    assert re.search(words, seen.read_text()), seen.read_text()


@pytest.mark.full
def test_another_tensor_degree_is_refused_in_one_line_and_another_number_of_ranks_announced(
    tmp_path: Path, prepared: Path
) -> None:
    run = Run(tmp_path / "run", prepared)
    run.train("train.steps=1")
    _, err = run.train("parallel.context=1", "parallel.tensor=2", "train.steps=2", code=2)
    assert "parallel.tensor was 1 and is 2; change that back" in err
    assert len(err.strip().splitlines()) == 1
    alone = Run(tmp_path / "alone", prepared)
    shutil.copytree(run.directory, alone.directory)
    out, _ = alone.train("launch.processes=1", "parallel.context=1", "train.steps=2")
    (line,) = (line for line in out.splitlines() if line.startswith("layout was "))
    assert line.startswith("layout was data 1 x context 2 x tensor 1 and is data 1 x context 1 x tensor 1: ")
    _, err = run.train("--resume", "never", code=2)
    assert "has checkpoints" in err
    out, _ = run.train("train.steps=2", "parallel.plan=all_gather")
    assert "changed since this run was last started: parallel.plan ring -> all_gather, train.steps 1 -> 2" in out
    _, err = run.train("train.steps=1", code=2)
    assert "train.steps is 1, but the run is at step 2 (" in err
    assert len(err.strip().splitlines()) == 1
    assert [row["step"] for row in run.rows()] == [1, 2]


@pytest.mark.full
def test_rows_of_several_lengths_go_on_where_the_run_stands(tmp_path: Path, prepared: Path) -> None:
    """With rows that other processes read, or none; but not over another curriculum."""
    keys = ["data.method=decompose", "data.decompose.shortest=32", "curriculum.odds=grow_p2", "curriculum.cycles=2"]
    keys += ["train.sequence_length=256", "train.tokens_per_step=512", "parallel.tokens_per_rank=128"]
    whole, killed = Run(tmp_path / "whole", prepared), Run(tmp_path / "killed", prepared)
    whole.train(*keys)
    process = killed.start(*keys, "data.workers=2")
    wait_for(lambda: len(killed.rows()) > EVERY)
    kill_launcher(process)
    _, err = killed.train(*keys, "curriculum.odds=uniform", code=2)
    assert "curriculum.odds was [8.0, 4.0, 2.0, 1.0] and is [1.0, 1.0, 1.0, 1.0]; change that back" in err
    out, _ = killed.train(*keys, "data.workers=1")
    assert f"resumed from {killed.directory}/checkpoints/step_00000005 at step 5" in out
    assert killed.values() == whole.values()
    assert {row["sequence_length"]: row["context"] for row in whole.rows()} == {256: 2, 128: 1, 64: 1, 32: 1}


@pytest.mark.full
def test_torchrun_runs_the_same_command(tmp_path: Path, prepared: Path, straight: Run) -> None:
    run = Run(tmp_path / "run", prepared)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "farspan.launch.command", "train", str(run.config)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert run.values() == straight.values()
