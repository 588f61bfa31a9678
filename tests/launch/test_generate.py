"""`farspan generate` as a user runs it, on a run that was just trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.corpus import prepare_small
from support.pool import Pool

from farspan.data.tokenizer import Tokenizer
from farspan.launch import elastic
from farspan.launch.command import main

pytestmark = pytest.mark.distributed

TEXT = "def load(path):\n    return open(path).read()\n\n\n" * 12
QUESTION = "def save("
RING = ("parallel.plan=ring", "parallel.order=zigzag")
MODEL = {
    "hidden_size": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "feed_forward_size": 128,
}


def farspan(*arguments: str, code: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "farspan.launch.command", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def train(folder: Path, prepared: Path, **parallel: Any) -> Path:
    """A run directory with checkpoints of steps 2 and 4, trained with Star Attention."""
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 7},
        "launch": {"processes": 2},
        "model": MODEL,
        "data": {"sources": ["unused"], "directory": str(prepared)},
        "train": {"steps": 4, "sequence_length": 255, "tokens_per_step": 510, "dtype": "fp32"},
        "parallel": {"context": 2, "plan": "star", "order": "two_class", **parallel},
        "attention": {"star": {"block": 32}},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    out, _ = farspan("train", str(folder / "config.yaml"))
    assert "Star Attention: blocks of 32 tokens, anchors of 32; global is the last 0.25 of a document" in out
    assert "warning: attention.star.block is 32: " in out
    (folder / "long.txt").write_text(TEXT)
    return folder / "run"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), prepared)


def ask(run: Path, *more: str, code: int = 0) -> tuple[str, str]:
    return farspan("generate", str(run), "--prompt-file", str(run.parent / "long.txt"), "--tokens=12", *more, code=code)


def answer_of_one_rank(
    rank: int, world: int, weights: dict[str, Any], text: list[int], question: list[int]
) -> list[int]:
    from farspan.models import prefill
    from farspan.models.config import ModelConfig
    from farspan.models.decoder import Decoder
    from farspan.models.layers import Sharding
    from farspan.models.reader import Reader
    from farspan.parallel.degrees import Degrees
    from farspan.parallel.mesh import Mesh

    mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
    try:
        model = Decoder(ModelConfig.model_validate({**MODEL, "vocabulary_size": 384}), Sharding())
        model.load_state_dict(weights)
        reader = Reader(model, mesh)
        reader.prefill(text, prefill.star(len(text), 32, 32, mesh, (4, 2)))
        reader.read(question)
        return list(reader.decode(12))
    finally:
        mesh.destroy()


def test_the_answer_is_that_of_the_newest_weights(pool: Pool, run: Path, prepared: Path) -> None:
    state = torch.load(
        run / "checkpoints/step_00000004/engine/mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )["module"]
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    text, question = tokenizer.encode(TEXT).tolist(), tokenizer.encode(QUESTION).tolist()
    expected = tokenizer.decode(pool.run(1, answer_of_one_rank, dict(state), text, question)[0])
    out, err = ask(run, "--question", QUESTION)
    assert out == f"{expected}\n"
    assert "step_00000004" in err
    assert "the text is read in blocks of 32 tokens with an anchor of 32" in err
    assert f"{len(text):,} tokens and {len(question):,} of the question read in " in err
    out, _ = ask(run, "--question", QUESTION, "--replicate-anchor")
    assert out == f"{expected}\n"
    out, err = ask(
        run, "--question", QUESTION, "parallel.context=1", "parallel.plan=single", "parallel.order=contiguous"
    )
    assert out == f"{expected}\n"


@pytest.mark.full
def test_ways_to_read_and_to_draw(run: Path) -> None:
    drawn, err = ask(run, "--question=-$x", "--star-block=1000", "--temperature=5", "--seed=1")
    assert "the text is read with dense attention, for it has less than two blocks" in err
    assert ask(run, "--question=-$x", "attention.star=null", *RING, "--temperature=5", "--seed=1")[0] == drawn


@pytest.mark.full
def test_damaged_weights_are_passed_over_and_nothing_is_changed(tmp_path: Path, run: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for file in run.rglob("*"):
        if file.is_file() and "logs" not in file.parts:
            copy = tmp_path / "run" / file.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (tmp_path / "long.txt").write_text(TEXT)
    weights = checkpoints / "step_00000004/engine/mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    _, err = ask(tmp_path / "run")
    assert f"DAMAGED CHECKPOINT {checkpoints / 'step_00000004'}: engine/mp_rank_00_model_states.pt has SHA-256" in err
    assert f"weights of {checkpoints / 'step_00000002'}" in err
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004"]
    (checkpoints / "step_00000002/manifest.json").write_text(json.dumps({}))
    _, err = ask(tmp_path / "run", code=2)
    assert err.splitlines()[-1] == f"farspan: there is no checkpoint to take weights from in {checkpoints}"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["model.layers=3"], "step_00000004 has other weights than this configuration: model.layers was 2 and is 3; "),
        (["parallel.tensor=2"], "parallel.tensor was 1 and is 2; change that back"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(run: Path, more: list[str], words: str) -> None:
    out, err = ask(run, *more, code=2)
    assert out == ""
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused now is refused before a worker starts."""
    monkeypatch.setattr(elastic, "run_workers", pytest.fail)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["attention.star=null", *RING, "--replicate-anchor"], "--star-block"),
        (["attention.stars=3"], "there is no key attention.stars, did you mean 'star'?"),
        (["attention.window={width: 8, full_layers: [0]}"], "give attention.window=null to read without windows"),
        (["--prompt-file=nowhere.txt"], "--prompt-file nowhere.txt cannot be read: No such file or directory"),
    ],
)
@pytest.mark.usefixtures("no_worker")
def test_what_cannot_be_is_one_line(run: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt-file", str(run.parent / "long.txt"), *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("farspan: ")
    assert words in err


@pytest.mark.usefixtures("no_worker")
def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "nothing"), "--prompt-file", "long.txt"]) == 2
    assert capsys.readouterr().err == f"farspan: {tmp_path / 'nothing'} is no run directory: it has no config.yaml\n"


@pytest.mark.full
@pytest.mark.parametrize(
    "parallel", [{"zero_stage": 3}, {"context": 1, "tensor": 2, "plan": "ring", "order": "zigzag"}]
)
def test_weights_in_pieces_are_put_together(
    tmp_path: Path, prepared: Path, run: Path, parallel: dict[str, Any]
) -> None:
    pieces = train(tmp_path, prepared, **parallel)
    assert ask(pieces, "--question", QUESTION)[0] == ask(run, "--question", QUESTION)[0]
