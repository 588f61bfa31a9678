"""Rows of several lengths: who shares them, and the same global batches on any ranks, from any step on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from farspan.data.errors import DataError
from farspan.data.prepared import Prepared
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.trainer.checkpoint.state import RunState
from farspan.trainer.checkpoint.store import CheckpointStore, Found
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.describe_schedule import describe_schedule
from farspan.trainer.feed import Feed
from farspan.trainer.first_rows import RunRows, training_steps
from farspan.trainer.row_length import context_of, degrees_for_rows, for_rows, narrower_contexts

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"dir": "runs/test", "seed": 4},
    "model": {
        "vocabulary_size": 60000,
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "feed_forward_size": 48,
    },
    "data": {"sources": ["none"], "directory": "none", "method": "decompose", "decompose": {"shortest": 16}},
    "curriculum": {"odds": "grow_p2", "cycles": 5},
    "train": {"steps": 100, "tokens_per_step": 1024, "sequence_length": 256, "dtype": "fp32"},
}


def config_of(**changes: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({key: SECTIONS.get(key, {}) | changes.get(key, {}) for key in SECTIONS | changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """About 300 documents, every token of the corpus a different number."""
    directory, draw = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    tokens = 0
    for split, count in (("train", 300), ("heldout", 20)):
        builder = IndexedDatasetBuilder(str(directory / f"{split}.bin"), dtype=np.uint16)
        for length in np.exp(draw.normal(4, 1.3, count)).astype(int) + 1:
            builder.add_document(np.arange(tokens, tokens + length), [int(length)])
            tokens += int(length)
        builder.finalize(str(directory / f"{split}.idx"))
    assert tokens < 2**16
    sources = {"text": {"train": range(300), "heldout": range(20)}}
    return Prepared(directory, directory / "tokenizer.model", "", 60000, 1, {}, {}, "", sources)


def test_degrees_follow_the_length() -> None:
    config = config_of(parallel={"context": 4, "tokens_per_rank": 64})
    assert config.row_lengths == (256, 128, 64, 32, 16)
    assert [context_of(config, length) for length in config.row_lengths] == [4, 2, 1, 1, 1]
    assert narrower_contexts(config) == [2, 1]
    degrees = Degrees(2, 4, 3)
    for length in config.row_lengths:
        here, shared = for_rows(config, length), degrees_for_rows(config, degrees, length)
        assert (here.train.sequence_length, here.parallel.context) == (length, shared.context)
        assert (shared.shard, shared.tensor) == (8, 3)
        # As many tokens of a rank in a micro-batch, and as many micro-batches in a step.
        assert here.train.micro_batch_rows * length // shared.context == 64
        assert here.train.rows_per_step == shared.data * here.train.micro_batch_rows * 2
        assert for_rows(here, length) == here


def test_without_a_limit_all_rows_have_one_degree() -> None:
    config = config_of(parallel={"context": 2}, train={**SECTIONS["train"], "micro_batch_rows": 2})
    assert narrower_contexts(config) == []
    assert [for_rows(config, length).train.micro_batch_rows for length in config.row_lengths] == [2, 4, 8, 16, 32]


def test_topologies_of_fewer_ranks() -> None:
    keys = {"context": 8, "tokens_per_rank": 32, "plan": "usp", "ulysses": 2, "inner": 2}
    found = [for_rows(config_of(parallel=keys), length).parallel for length in (256, 128, 64, 32)]
    assert [(p.context, p.ulysses, p.inner) for p in found] == [(8, 2, 2), (4, 2, 2), (2, 2, 1), (1, 1, 1)]


class Place:
    """Stands for a process group: all that the feed asks is this process's place in it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


def feeds_of(prepared: Prepared, config: RunConfig, ranks: int) -> list[Feed]:
    """One for each of so many data x context ranks."""
    context = min(ranks, config.parallel.context)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context": context})})
    feeds = []
    for rank in range(ranks):

        def mesh(degree: int, rank: int = rank) -> Mesh:
            groups = {name: Place(0) for name in ("loss", "shard", "tensor", "control")}
            groups |= {"batch": Place(rank // degree), "context": Place(rank % degree)}
            degrees = Degrees(ranks // degree, degree, 1)
            return Mesh(degrees=degrees, device=torch.device("cpu"), links={}, **groups)  # type: ignore[arg-type]

        whole = replace(mesh(context), narrower={degree: mesh(degree) for degree in narrower_contexts(config)})
        feeds.append(Feed(config, config.model, RunRows.of(config, prepared), whole))
    return feeds


def digest_of_step(feeds: list[Feed], step: int) -> str:
    """Of the tokens, labels and positions of all samples of a step, put together from the ranks."""
    found: dict[int, bytes] = {}
    batches = [feed.training_batches(step) for feed in feeds]
    for micro_batch in range(len(batches[0])):
        sharing = feeds[0].sharing_of_step(step)
        for first in range(0, len(feeds), sharing.mesh.degrees.context):
            parts = [batches[rank][micro_batch] for rank in range(first, first + sharing.mesh.degrees.context)]
            assert len({part.samples for part in parts}) == 1
            names = ("tokens", "labels", "rotary_positions")
            whole = torch.stack([parts[0].order.unshard([getattr(part, name) for part in parts]) for name in names])
            for place, sample in enumerate(parts[0].samples):
                assert sample not in found
                found[sample] = whole[:, place].numpy().tobytes()
    assert sorted(found) == list(feeds[0].steps.samples(step))
    return hashlib.sha256(b"".join(found[sample] for sample in sorted(found))).hexdigest()


@pytest.fixture(scope="module")
def digests(prepared: Prepared) -> list[str]:
    """Of all steps, on one rank that took them one after the other."""
    feeds = feeds_of(prepared, config_of(), 1)
    return [digest_of_step(feeds, step) for step in range(70)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "held"), [(1, 256), (2, 128), (4, 64), (4, 256)])
def test_global_batches_after_a_resume_do_not_depend_on_ranks_or_workers(
    prepared: Prepared, digests: list[str], ranks: int, held: int, workers: int
) -> None:
    data = {**SECTIONS["data"], "workers": workers}
    config = config_of(data=data, parallel={"context": 4 if held == 64 else 2, "tokens_per_rank": held})
    feeds = feeds_of(prepared, config, ranks)
    assert [digest_of_step(feeds, step) for step in range(20, 70)] == digests[20:]
    for feed in feeds:
        feed.close()


BLEND = {
    "parts": {"long": {"source": "text", "min_tokens": 200}, "short": {"source": "text", "max_tokens": 199}},
    "stages": [{"steps": 40, "weights": {"long": 1, "short": 1}}, {"weights": {"long": 3, "short": 1}}],
}


@pytest.mark.parametrize(("ranks", "held", "workers"), [(2, 128, 0), (4, 64, 2)])
def test_blended_batches_do_not_depend_on_ranks_or_workers(
    prepared: Prepared, ranks: int, held: int, workers: int
) -> None:
    data = {**SECTIONS["data"], "blend": BLEND}
    alone = feeds_of(prepared, config_of(data=data), 1)
    config = config_of(data={**data, "workers": workers}, parallel={"context": ranks, "tokens_per_rank": held})
    feeds = feeds_of(prepared, config, ranks)
    for step in range(30, 60):  # one stage ends at step 40
        assert digest_of_step(feeds, step) == digest_of_step(alone, step)
    for feed in feeds:
        feed.close()


def test_the_seed_and_the_curriculum_change_the_batches(prepared: Prepared, digests: list[str]) -> None:
    assert len(set(digests)) == len(digests)
    for changes in ({"run": {"dir": "x", "seed": 5}}, {"curriculum": {"odds": "uniform", "cycles": 5}}):
        feeds = feeds_of(prepared, config_of(**changes), 1)
        assert [digest_of_step(feeds, step) for step in range(1, 5)] != digests[1:5]


def test_too_little_text_for_a_step_of_the_longest_rows(prepared: Prepared) -> None:
    train = {**SECTIONS["train"], "sequence_length": 4096, "tokens_per_step": 8192}
    with pytest.raises(DataError, match=r"the text has \d rows of train.sequence_length 4096, and a step takes 2: low"):
        training_steps(config_of(train=train), prepared)


def test_the_schedule_in_words(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.trainer.describe_schedule.load_prepared", lambda directory: prepared)
    lines: list[str] = []
    describe_schedule(config_of(curriculum={"mixture": "equal", "cycles": 5}), lines.append)
    assert lines[0] == ("100 steps of 1,024 tokens in 5 cycles, odds grow_p2, mixture equal, schedule random")
    table = [line.split() for line in lines[2:7]]
    assert [row[0] for row in table] == ["256", "128", "64", "32", "16"]
    assert [row[4] for row in table] == ["20"] * 5
    assert [row[6] for row in table] == ["4", "8", "16", "32", "64"]
    tokens = sum(int(row[2].replace(",", "")) for row in table)
    discarded = int(lines[7].split()[1].replace(",", ""))
    documents = 300 - int(lines[7].split("with ")[1].split()[0])
    # All tokens are in rows, or a document's last label, or discarded.
    whole = int(lines[7].split(" of ")[1].split()[0].replace(",", ""))
    assert tokens + documents + discarded == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": {"dir": "x", "seed": 5}}, "run.seed was 4 and is 5"),
        (
            {"curriculum": {"odds": "uniform", "cycles": 5}},
            "curriculum.odds was [16.0, 8.0, 4.0, 2.0, 1.0] and is [1.0,",
        ),
        ({"curriculum": {"odds": "grow_p2", "cycles": 10}}, "train.steps / curriculum.cycles was 20 and is 10"),
        ({"curriculum": {"odds": "grow_p2", "cycles": 5, "mixture": "equal"}}, "mixture was natural and is equal"),
        ({"data": SECTIONS["data"] | {"decompose": {"shortest": 32}}}, "data.decompose.shortest was 16 and is 32"),
        ({"data": {"sources": ["none"], "directory": "none"}, "curriculum": {}}, "method was decompose and is concat"),
    ],
)
def test_another_order_of_samples_is_not_resumed(prepared: Prepared, changes: dict[str, Any], named: str) -> None:
    sections = {key: changes[key] if key in changes else SECTIONS[key] for key in SECTIONS}
    now = state_of(RunConfig.model_validate(sections), prepared)
    with pytest.raises(ConfigError, match=re.escape(named)):
        now.check(Found(10, Path("step_10"), {"identity": state_of(config_of(), prepared).identity}))


def test_another_text_or_tokenizer_is_not_resumed(prepared: Prepared) -> None:
    saved = Found(10, Path("step_10"), {"identity": state_of(config_of(), prepared).identity})
    for change, named in (({"fingerprint": "b"}, "data (fingerprint)"), ({"tokenizer_digest": "c"}, "data.tokenizer")):
        with pytest.raises(ConfigError, match=re.escape(named)):
            state_of(config_of(), replace(prepared, **change)).check(saved)


def test_tokens_of_a_rank_and_workers_may_change(prepared: Prepared) -> None:
    saved = Found(10, Path("step_10"), {"identity": state_of(config_of(), prepared).identity})
    changed = config_of(parallel={"tokens_per_rank": 256}, data=SECTIONS["data"] | {"workers": 3})
    state_of(changed, prepared).check(saved)


def state_of(config: RunConfig, prepared: Prepared) -> RunState:
    return RunState(CheckpointStore(Path("none"), keep=1), config, config.model, Degrees(1, 1, 1), prepared)
