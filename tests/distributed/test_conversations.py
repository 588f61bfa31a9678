"""From questions in `.jsonl` to training on their answers, with Star Attention's blocks over the contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.conversations import prepare_questions
from support.pool import Pool
from support.training import small_model, train_runs

from farspan.data.corpus import Corpus
from farspan.data.prepared import load_prepared
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.packing import describe_rows, heldout_rows, packed_steps
from farspan.trainer.preflight import check

pytestmark = pytest.mark.distributed

LENGTH = 384


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_questions(tmp_path_factory.mktemp("questions"), "plain")


def config_of(directory: Path, prepared: Path, context: int = 1, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": small_model(2),
        "data": {"sources": ["unused"], "directory": str(prepared), "method": "best_fit", "overlong": "drop"},
        "train": {"steps": 4, "sequence_length": LENGTH, "tokens_per_step": 2 * LENGTH, "dtype": "fp32"},
        "attention": {"star": {"block": 32, "mode": "sft"}},
        "parallel": {"context": context, "plan": "star", "order": "two_class"},
        "eval": {"rows": 3},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return RunConfig.model_validate(tree)


def test_rows_ask_for_answers_alone(tmp_path: Path, prepared: Path) -> None:
    config, opened = config_of(tmp_path, prepared), load_prepared(prepared)
    records = [json.loads(line) for line in (prepared.parent / "questions.jsonl").read_text().splitlines()]
    answers = {record["answer"] for record in records}
    tokenizer = opened.open_tokenizer()
    steps, heldout = packed_steps(config, opened), heldout_rows(config, opened)
    rows = [steps.row(sample) for sample in steps.samples(0)] + [heldout[0]]
    for row in rows:
        assert row.contexts is not None
        assert len(row.contexts) == len(row.cu_seqlens) - 1
        found = tokenizer.decode(row.labels[row.labels >= 0])
        asked = 0
        for (begin, end), context in zip(zip(row.cu_seqlens, row.cu_seqlens[1:]), row.contexts):
            labels = row.labels[begin:end]
            if context == end - begin:  # padding
                assert (labels == -100).all()
                continue
            asked += 1
            assert tokenizer.decode(labels[labels >= 0]) in answers
            assert labels[labels >= 0][-1] == opened.eod
            question = tokenizer.decode(row.tokens[begin + context : end])
            assert question.startswith("\nLine ")
        assert asked > 1
        assert found


def test_training_on_answers_does_not_depend_on_the_ranks(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    runs = {
        "alone": (1, config_of(tmp_path / "alone", prepared)),
        "star": (2, config_of(tmp_path / "star", prepared, 2)),
        "ring": (2, config_of(tmp_path / "ring", prepared, 2, parallel={"plan": "ring", "order": "zigzag"})),
    }
    found = {name: pool.run(world, train_runs, [config])[0][0] for name, (world, config) in runs.items()}
    corpus = Corpus(load_prepared(prepared), "train")
    told = [answers for i in range(len(corpus.lengths)) if (answers := corpus.answers(i)) is not None]
    answered = sum(int((answers.spans[:, 1] - answers.spans[:, 0]).sum()) for answers in told)
    assert 0 < found["alone"][0]["tokens"] < answered
    for row in found["star"]:  # all tokens are processed, though few have a label
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(2 * LENGTH)
    for name in ("star", "ring"):
        assert len(found[name]) == 4
        for one, other in zip(found["alone"], found[name], strict=True):
            assert one["tokens"] == other["tokens"]
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert found["star"][-1]["eval_loss"] == pytest.approx(found["alone"][-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"method": "concat", "overlong": "split"},
            "which data.method concat .* would cut: set data.method to best_fit or padded, and",
        ),
        ({"overlong": "split"}, "data.overlong split would cut: set data.overlong to drop or truncate"),
        ({"method": "decompose", "overlong": "split"}, "holds conversations, which data.method decompose"),
    ],
)
def test_conversations_are_never_cut(tmp_path: Path, prepared: Path, data: dict[str, Any], said: str) -> None:
    changes: dict[str, Any] = {
        "data": data,
        "attention": {"star": None},
        "parallel": {"plan": "ring", "order": "zigzag"},
    }
    if data.get("method") == "decompose":
        changes["train"] = {"sequence_length": 256, "tokens_per_step": 1024}
    with pytest.raises(ConfigError, match=said):
        check(config_of(tmp_path, prepared, **changes), 1)


TRUNCATED: dict[str, Any] = {
    "data": {"overlong": "truncate"},
    "attention": {"star": None},
    "parallel": {"plan": "ring", "order": "zigzag"},
}


def test_conversations_that_are_truncated_before_their_answers_are_left_out(tmp_path: Path, prepared: Path) -> None:
    """Answers are behind the contexts, most of which are longer than a row."""
    train = {"steps": 40, "sequence_length": 160, "tokens_per_step": 320}
    for method in ("padded", "best_fit"):
        changes = TRUNCATED | {"data": {"overlong": "truncate", "method": method}}
        config, opened = config_of(tmp_path, prepared, **changes, train=train), load_prepared(prepared)
        steps, heldout = packed_steps(config, opened), heldout_rows(config, opened)
        rows = [steps.row(sample) for step in range(40) for sample in steps.samples(step)]
        rows += [heldout[row] for row in range(len(heldout))]
        assert all(row.valid for row in rows)
        corpus = Corpus(opened, "train")
        behind = [
            number
            for number in range(len(corpus.lengths))
            if (answers := corpus.answers(number)) is not None and answers.spans[0, 0] > 160
        ]
        (line,) = describe_rows(config, steps)
        assert line.endswith(f"; {len(behind)} conversations are left out, whose answers begin behind a row's end")


def test_no_conversation_that_is_answered_in_time_is_an_error(tmp_path: Path, prepared: Path) -> None:
    train = {"sequence_length": 16, "tokens_per_step": 32}
    with pytest.raises(
        ConfigError, match=r"none of \d+ conversations of the train split has an answer in its first 16 .*: raise tr"
    ):
        check(config_of(tmp_path, prepared, **TRUNCATED, train=train), 1)


def test_conversations_that_are_all_too_long_are_an_error(tmp_path: Path, prepared: Path) -> None:
    train = {"sequence_length": 64, "tokens_per_step": 128}
    with pytest.raises(ConfigError, match=r"none of .* documents fits into rows of train\.sequence_length 64"):
        check(config_of(tmp_path, prepared, train=train), 1)
