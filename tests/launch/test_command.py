"""The `farspan` command: each mistake is one line and exit code 2, before anything is made or started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from farspan.launch import elastic
from farspan.launch.command import main
from farspan.trainer.run_lock import RunLock

WORDS = ("some", "short", "words", "of", "a", "plain", "text", "come", "again", "in", "another", "order")
CONFIG = """
run: {{dir: {folder}/run}}
launch: {{processes: 1, stop_seconds: 7}}
model: {{hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, feed_forward_size: 48}}
data: {{sources: [{folder}/text], directory: {folder}/prepared, vocabulary_size: 300, heldout_fraction: 0.2}}
train: {{steps: 2, tokens_per_step: 256, sequence_length: 64, dtype: fp32}}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a torchrun worker; and what the command sets for DeepSpeed must not outlive the test."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, its text, and the data that `farspan prepare` made of it."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "text").mkdir()
    for number in range(24):
        words = (WORDS[(number * i + i * i) % len(WORDS)] for i in range(300))
        (folder / "text" / f"{number:02d}.txt").write_text(" ".join(words))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    assert main(["prepare", str(folder / "config.yaml")]) == 0
    return folder


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What would have been started, instead of starting it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def instead(*positional: Any, **named: Any) -> int:
        calls.append((positional, named))
        return 0

    monkeypatch.setattr(elastic, "run_workers", instead)
    return calls


def farspan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user's shell runs it."""
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return subprocess.run(
        [sys.executable, "-m", "farspan.launch.command", *arguments],
        capture_output=True,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for verb in ("train", "prepare", "plan", "doctor", "checkpoint"):
        assert re.search(rf"^ +{verb}\b", shown, re.MULTILINE), verb
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        usage = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
        assert f"farspan {verb}" in usage
        assert {"train": "[--resume {auto,never}]", "plan": "[--plot FILE.png]"}.get(verb, "") in usage


@pytest.mark.parametrize("arguments", [[], ["tran"], ["train"], ["checkpoint"], ["train", "a", "--resume", "maybe"]])
def test_what_is_no_command_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: farspan" in capsys.readouterr().err


def test_help_needs_none_of_the_libraries() -> None:
    """The command answers at once: torch and what is on it take seconds to import."""
    heavy = "print([name for name in ('torch', 'megatron', 'deepspeed') if name in sys.modules])"
    code = f"import sys; from farspan.launch.command import _parser; _parser().format_help(); {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n"


# Mistakes.


def check_refused(
    arguments: Sequence[str], words: str, folder: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("farspan: ")
    assert written.err.endswith("\n")
    assert written.err.count("\n") == 1
    assert words in written.err
    assert launches == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], "there is no key train.stepz, did you mean 'steps'?"),
        (["launch.processes=3", "parallel.context=2"], "3 processes cannot be divided into parallel.context 2 x "),
        (["launch.processes=3"], "train.tokens_per_step 256 is 4 rows of train.sequence_length 64, which data 3 x "),
        (["data.directory={folder}/nowhere"], "There is no prepared data in {folder}/nowhere"),
        (["data.tokenizer={folder}/config.yaml"], "data.tokenizer is {folder}/config.yaml (sha256 "),
        (["data.tokenizer={folder}/none.model"], "data.tokenizer is {folder}/none.model, where no file is"),
        (["model.vocabulary_size=299"], "model.vocabulary_size 299 is smaller than the tokenizer's 300"),
        (["deepspeed={bf16: {enabled: true}}"], "deepspeed.bf16 is set by train.dtype"),
        (["train.steps"], "'train.steps' is not an override"),
    ],
)
def test_train_refuses_what_cannot_run(
    prepared: Path,
    launches: list[Any],
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    words: str,
) -> None:
    overrides = [override.replace("{folder}", str(prepared)) for override in overrides]
    arguments = ["train", str(prepared / "config.yaml"), *overrides]
    check_refused(arguments, words.replace("{folder}", str(prepared)), prepared, launches, capsys)


@pytest.mark.parametrize("verb", ["train", "prepare", "plan"])
def test_a_missing_configuration(
    verb: str, tmp_path: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing.yaml"
    words = f"the configuration {path} cannot be read: No such file or directory"
    check_refused([verb, str(path)], words, tmp_path, launches, capsys)


def test_a_run_that_another_process_holds(
    prepared: Path, tmp_path: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    with RunLock(directory):
        arguments = ["train", str(prepared / "config.yaml"), f"run.dir={directory}"]
        check_refused(arguments, str(directory), tmp_path, launches, capsys)


@pytest.mark.parametrize(
    ("as_worker", "overrides", "words"),
    [
        (False, ["train.stepz=3"], "there is no key train.stepz, did you mean 'steps'?"),
        (False, ["launch.processes=2", "parallel.context=3"], "2 processes cannot be divided into parallel.context 3"),
        (True, ["train.sequence_length=32", "parallel.context=2"], "1 process cannot be divided into"),
    ],
    ids=["a misspelt key", "an impossible mesh", "a torchrun worker"],
)
def test_a_real_command_says_one_line_and_nothing_else(
    prepared: Path, as_worker: bool, overrides: list[str], words: str
) -> None:
    """What libraries print when they are imported would drown it."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} if as_worker else {}
    done = farspan("train", str(prepared / "config.yaml"), *overrides, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("farspan: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (prepared / "run").exists()


def test_what_can_run_is_started(prepared: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The other side of the refusals above."""
    config = str(prepared / "config.yaml")
    assert main(["train", config, "train.steps=1", "--resume", "never"]) == 0
    (((module, arguments), named),) = launches
    assert module == "farspan.launch.worker"
    assert arguments == [config, "train.steps=1", "--resume", "never", "--parent", str(os.getpid())]
    assert named == {"processes": 1, "stop_seconds": 7.0, "log_directory": prepared / "run" / "logs"}
    assert capsys.readouterr().err == ""


def test_prepare_again_has_nothing_to_do(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(prepared / "config.yaml")]) == 0
    assert capsys.readouterr().out.endswith("Nothing to do.\n")
    assert main(["prepare", str(prepared / "config.yaml"), *LONG[-2:]]) == 0
    warning = capsys.readouterr().out.split("Nothing to do.\n")[1]
    assert warning.count("\n") == 2
    assert re.search(r"warning: train.sequence_length is 524288, but the heldout split has only \d+ tokens: ", warning)


def test_output_that_nobody_reads_any_more_is_no_error(prepared: Path) -> None:
    """As behind `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "farspan.launch.command", "plan", str(prepared / "config.yaml")]
    with os.fdopen(writing, "w") as nowhere:
        done = subprocess.run(command, stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, "")


def test_prepare_without_its_sources(prepared: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", str(prepared / "config.yaml"), "data.sources=[nowhere]"]
    check_refused(arguments, "data.sources names 'nowhere'", prepared, launches, capsys)


# data schedule

DECOMPOSED = (
    "data.method=decompose",
    "data.decompose.shortest=16",
    "parallel.context=2",
    "parallel.tokens_per_rank=32",
)


def test_the_schedule_of_a_run(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "schedule", str(prepared / "config.yaml"), *DECOMPOSED, "train.steps=9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "9 steps of 256 tokens in 1 cycle, odds uniform, mixture natural, schedule random"
    table = {row.split()[0]: row.split() for row in lines[2:5]}
    assert {length: row[-1] for length, row in table.items()} == {"64": "2", "32": "1", "16": "1"}
    assert sum(int(row[4]) for row in table.values()) == 9


def test_rows_of_one_length_have_no_schedule(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "schedule", str(prepared / "config.yaml")]) == 2
    assert "data.method concat makes rows of one length" in capsys.readouterr().err


def test_a_schedule_is_not_drawn_into_nowhere(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = str(prepared / "nowhere" / "schedule.png")
    assert main(["data", "schedule", str(prepared / "config.yaml"), *DECOMPOSED, "--plot", plot]) == 2
    assert "there is no folder" in capsys.readouterr().err


# plan


def test_plan_has_a_line_on_each_shorter_length(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(prepared / "config.yaml"), *DECOMPOSED, "launch.processes=4"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 processes = data 2 x context 2 x tensor 1" in out
    for length, rows in ((32, "1 row"), (16, "2 rows")):
        assert f"rows {length} tokens: data 4 x context 1, {rows} in a micro-batch, ring, verified" in out


def plan_lines(capsys: pytest.CaptureFixture[str], prepared: Path, *overrides: str) -> dict[str, str]:
    """What `farspan plan` prints, by the first word of each line."""
    assert main(["plan", str(prepared / "config.yaml"), *overrides]) == 0
    written = capsys.readouterr()
    assert written.err == ""
    return {line.split()[0]: line for line in written.out.splitlines()}


def test_plan_of_one_rank_sends_nothing(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan_lines(capsys, prepared)
    assert "1 processes = data 1 x context 1 x tensor 1" in lines["mesh"]
    assert "64 tokens" in lines["sequence"]
    assert f"{64 * 65 // 2:,} visible pairs" in lines["attention"]
    for direction in ("forward", "backward"):
        assert "0.000 MB from the busiest rank, 0.000 MB in all" in lines[direction]
    assert "verified" in lines


def test_plan_of_four_ranks_by_the_closed_form(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    length, context, kv_heads, head_dim, item = 4096, 4, 2, 8, 4
    lines = plan_lines(
        capsys,
        prepared,
        "launch.processes=8",
        "parallel.context=4",
        "parallel.plan=all_gather",
        f"train.sequence_length={length}",
        f"train.tokens_per_step={2 * length}",
    )
    assert "8 processes = data 2 x context 4 x tensor 1" in lines["mesh"]
    assert "in zigzag order, 1,024 slots a rank (0 padding)" in lines["sequence"]
    assert f"{length * (length + 1) // 2:,} visible pairs" in lines["attention"]
    # Every rank sends its keys and values to the three others; zigzag needs all of them everywhere but the last chunk.
    most = length // context * kv_heads * head_dim * 2 * item * (context - 1) / 1e6
    assert f"{most:,.3f} MB from the busiest rank, {context * most:,.3f} MB in all" in lines["forward"]
    # Backward they go again, and as many gradients come back.
    assert f"{2 * most:,.3f} MB from the busiest rank, {2 * context * most:,.3f} MB in all" in lines["backward"]
    assert "verified" in lines


@pytest.mark.parametrize("order", ["zigzag", "striped"])
def test_plan_of_a_million_tokens_on_sixty_four_ranks(
    prepared: Path, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    """Seconds and megabytes: nothing here may be as large as the attention matrix."""
    lines = plan_lines(
        capsys,
        prepared,
        "launch.processes=64",
        "parallel.context=64",
        f"parallel.order={order}",
        "train.sequence_length=1000000",
        "train.tokens_per_step=1000000",
    )
    assert "1,000,000 tokens" in lines["sequence"]
    assert "500,000,500,000 visible pairs" in lines["attention"]
    assert "verified" in lines


def test_plan_counts_windows_between_full_layers(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two ranks in contiguous order a window's keys come from one neighbour; a full layer needs all of its keys."""
    length, width, kv_heads, head_dim, item = 4096, 100, 2, 8, 4
    arguments = [
        "launch.processes=2",
        "parallel={context: 2, plan: group_cast, order: contiguous}",
        "model.layers=3",
        f"attention.window={{width: {width}, full_layers: [1]}}",
        f"train.sequence_length={length}",
        f"train.tokens_per_step={length}",
    ]
    assert main(["plan", str(prepared / "config.yaml"), *arguments]) == 0
    words = " ".join(capsys.readouterr().out.split())
    narrow, full = words.split("layers 2 of 3, whose tokens see the last 100 tokens: ")[1].split(
        "layers 1 of 3, whose tokens see all before: "
    )
    token = kv_heads * head_dim * 2 * item / 1e6
    for part, pairs, sent in (
        (narrow, width * (width + 1) // 2 + (length - width) * width, (width - 1) * token),
        (full, length * (length + 1) // 2, length // 2 * token),
    ):
        assert part.startswith("plan group_cast: ")
        assert f"attention {pairs:,} visible pairs a head" in part
        assert f"forward each layer sends {sent:,.3f} MB from the busiest rank, {sent:,.3f} MB in all" in part
    assert words.count("ranks work MB sent forward backward") == 2


LONG = ("model.preset=qwen2.5-3b", "train.dtype=bf16", "train.sequence_length=524288", "train.tokens_per_step=524288")


def test_plan_says_what_to_change_when_a_gpu_is_too_small(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farspan.kernels.triton.backend._INTERPRETED", False)  # as on a GPU
    config = prepared / "long.yaml"
    tree = yaml.safe_load((prepared / "config.yaml").read_text())
    tree["model"] = {}
    config.write_text(yaml.safe_dump(tree))
    assert main(["plan", str(config), *LONG]) == 0
    written = capsys.readouterr().out
    assert max(map(len, written.splitlines())) <= 100
    words = " ".join(written.split())
    assert re.search(r"memory \d+\.\d\d of 139\.8 GiB of a GPU", words)
    assert re.search(
        r"does not fit by \d+\.\d GiB: set memory\.offload: true, or parallel\.context: 4 with launch\.processes: 4",
        words,
    )
    assert re.search(r"step \d+\.\d+ s expected, [\d,]+ tokens/s: \d+\.\d+ s of compute and 0\.000 s of exposed", words)
    assert main(["plan", str(config), *LONG, "launch.processes=16", "parallel.context=16", "parallel.plan=auto"]) == 0
    written = capsys.readouterr().out
    assert max(map(len, written.splitlines())) <= 100
    words = " ".join(written.split())
    assert "does not fit" not in words
    assert "h200: 2 nodes of 8 H200, 362 GB/s inside, 45 GB/s between them" in words
    assert re.search(r"choice parallel\.plan auto is (\w+): .* is expected to take \1 [\d.,]+ ms, ", words)
    assert "what other nodes need enters each of them" in words
    assert re.search(r"0-15 +1\.000 ", words)


def test_plan_of_a_time_that_nobody_measured(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no time predicted: rates were measured in bf16" in plan_lines(capsys, prepared)["step"]
    lines = plan_lines(capsys, prepared, "train.dtype=bf16", "attention.backend=reference")
    assert "no time predicted: attention.backend reference was not measured on NVIDIA H200" in lines["step"]


def test_plan_draws_or_says_what_is_missing(
    prepared: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = prepared / "plan.png"
    arguments = ["plan", str(prepared / "config.yaml"), "--plot", str(picture)]
    if find_spec("matplotlib") is None:
        assert main(arguments) == 2
        assert capsys.readouterr() == ("", "farspan: --plot needs matplotlib: pip install 'farspan[plot]'\n")
        return
    assert main([*arguments, "attention.window={width: 8, full_layers: [1]}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for path, words in (("plan.nonsense", "the name must end in one of "), ("no/plan.png", "there is no folder ")):
        check_refused([*arguments[:-1], str(prepared / path)], words, prepared, launches, capsys)


def test_plan_of_an_unknown_cluster(prepared: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(prepared / "config.yaml"), "cluster=h201"]
    check_refused(arguments, "there is no cluster 'h201'; did you mean 'h200'?", prepared, launches, capsys)


def test_plan_refuses_what_train_refuses_of_the_deepspeed_section(
    prepared: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(prepared / "config.yaml"), "deepspeed.zero_optimization.stage=3"]
    words = "deepspeed.zero_optimization.stage is set by parallel.zero_stage"
    check_refused(arguments, words, prepared, launches, capsys)


def test_plan_of_rows_that_do_not_divide_names_the_nearest(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(prepared / "config.yaml"), "launch.processes=3"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "do not divide the 4 rows of a step; the nearest train.tokens_per_step that goes is 192 " in words


def test_plan_refuses_an_impossible_mesh(
    prepared: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(prepared / "config.yaml"), "launch.processes=6", "parallel.context=4"]
    check_refused(arguments, "6 processes cannot be divided into parallel.context 4", prepared, launches, capsys)


# doctor


def doctor_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["doctor", *arguments]) == 0
    written = capsys.readouterr()
    assert written.err == ""
    return [" ".join(line.split()) for line in written.out.splitlines()]


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor_lines(capsys)
    assert f"torch {torch.__version__}".split("+")[0] in " ".join(lines)
    assert "reference can run" in lines
    if not torch.cuda.is_available():
        assert "device no GPU;" in " ".join(lines)
        assert "cudnn needs a GPU" in lines
        assert lines[-1] == "auto means reference here, for there is no GPU"
        assert len(lines) == len(set(lines))


def test_doctor_speaks_of_another_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor_lines(capsys, "--gpu", "sm_90")
    assert "cudnn can run" in lines
    assert lines[-1].startswith("auto chooses by what was measured on NVIDIA H200 (sm_90, torch ")
    assert "otherwise" not in lines[-1]
    older = doctor_lines(capsys, "--gpu", "sm_80")
    assert "cudnn needs a GPU of compute capability 9.0 or newer" in older
    assert older[-1].endswith("; sm_80 may rank them otherwise, which benchmarks/rates.py measures")
    with pytest.raises(SystemExit):
        main(["doctor", "--gpu", "h100"])
    assert "a compute capability is written like sm_90, not 'h100'" in capsys.readouterr().err


def test_damaged_text_is_not_taken_for_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "dataset.json").write_text("{")
    assert main(["doctor", str(config), *RING, "train.tokens_per_step=8192", "--gpu", "sm_90"]) == 2
    assert "dataset.json is damaged" in capsys.readouterr().err


RING = ("launch.processes=2", "parallel.context=2", "model.head_dim=64", "train.sequence_length=8192")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_doctor_says_who_computes_each_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    """Without text a row is one document, whose zigzag ring has three kinds of piece."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    lines = doctor_lines(
        capsys, str(config), *RING, "train.tokens_per_step=8192", f"attention.backend={backend}", "--gpu", "sm_90"
    )
    assert "attention of fp32 with head dim 64, on sm_90:" in lines
    assert any(
        line.startswith("batch rows of one document, 8,192 tokens, since there is no text for them. ") for line in lines
    )
    assert f"pieces of one layer on context rank 0, 1 of 2, with attention.backend {backend}:" in lines
    assert lines[-3:] == [
        "2 causal 4096 x 4096: forward triton, backward triton",
        "1 full 2048 x 4096: forward triton, backward triton",
        "1 full 4096 x 2048: forward triton, backward triton",
    ]


def test_doctor_reads_the_first_batch(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor_lines(capsys, str(prepared / "config.yaml"))
    (batch,) = (line for line in lines if line.startswith("batch "))
    assert re.fullmatch(r"batch the first of training: 1 x 64 tokens, \d+ documents?, each seen by itself", batch)
    assert re.fullmatch(r"1 (causal|general) 64 x 64: forward reference, backward reference", lines[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what needs a GPU")
@pytest.mark.parametrize("verb", ["doctor", "train"])
def test_a_backend_that_cannot_run_is_refused(prepared: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(prepared / "config.yaml"), "attention.backend=cudnn"]) == 2
    assert capsys.readouterr().err == "farspan: attention.backend is 'cudnn', but cudnn needs a GPU; set it to auto\n"


# checkpoint


@pytest.mark.parametrize(("action", "code"), [("list", 0), ("verify", 1)])
def test_a_run_without_checkpoints(action: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one whose folder of checkpoints is there and holds none. Nothing to verify is no success."""
    for _ in range(2):
        assert main(["checkpoint", action, str(tmp_path)]) == code
        assert capsys.readouterr().out == f"there are no checkpoints in {tmp_path / 'checkpoints'}\n"
        (tmp_path / "checkpoints" / "step_00000003.tmp").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_run_that_is_not_there(
    action: str, tmp_path: Path, launches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nowhere"
    check_refused(["checkpoint", action, str(path)], f"there is no run directory {path}", tmp_path, launches, capsys)


def test_damaged_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "checkpoints" / "step_00000007"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(f"{broken}: ")
    assert "good" not in shown
    assert main(["checkpoint", "verify", str(broken)]) == 1
    assert capsys.readouterr().out == shown
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "unreadable" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "checkpoints")]) == 1
    assert capsys.readouterr().out == shown
    broken.rename(broken.with_name("step_00000007.damaged"))
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "step_00000007.damaged: was damaged and set aside" in capsys.readouterr().out


def test_overrides_may_stand_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "no.yaml"), "--resume", "never", "train.steps=3"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "no.yaml"), "--train.steps=3"])
    assert "unrecognized arguments: --train.steps=3" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    file = tmp_path / "file"
    file.write_text("x = 1\n" * 5000)
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"preset": "tiny"},
        "data": {"sources": [str(Path(__file__).parent)], "directory": str(file / "prepared"), "heldout_fraction": 0.5},
        "train": {"steps": 1, "tokens_per_step": 64, "sequence_length": 64},
    }
    config.write_text(yaml.safe_dump(tree))
    assert main(["prepare", str(config)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert len(error.strip().splitlines()) == 1
