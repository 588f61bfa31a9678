"""Blends of rows of several lengths: parts have their weights of the tokens, whatever lengths their documents have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pydantic import ValidationError

from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.prepared import Prepared
from farspan.data.statistics import describe_lengths
from farspan.trainer.blended import taken_of_parts
from farspan.trainer.callbacks.mixture import Mixture
from farspan.trainer.config import RunConfig
from farspan.trainer.describe_schedule import describe_schedule
from farspan.trainer.first_rows import training_steps
from farspan.trainer.packing import describe_rows
from farspan.trainer.token_shares import shares_of_stages
from farspan.trainer.trainer import StepRecord

STEPS, STEP = 240, 1024
LENGTHS = {"short": (1500, 3.5, 0.7), "mixed": (400, 4.5, 1.2), "long": (60, 6.5, 0.5)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Three sources, each of whose tokens are its number: `short` has hardly a row of 256, and `long` few others."""
    directory, draw = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    builder = IndexedDatasetBuilder(str(directory / "train.bin"), dtype=np.uint16)
    sources, first = {}, 0
    for source, (name, (count, mean, spread)) in enumerate(LENGTHS.items()):
        for length in np.exp(draw.normal(mean, spread, count)).astype(int) + 2:
            builder.add_document(np.full(length, source), [int(length)])
        sources[name] = {"train": range(first, first + count), "heldout": range(0)}
        first += count
    builder.finalize(str(directory / "train.idx"))
    return Prepared(directory, directory / "tokenizer.model", "", 384, 1, {}, {}, "", sources)


def config_of(parts: dict[str, Any], stages: list[Any] | None = None, cycles: int = 4, **curriculum: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused", "seed": 3},
            "model": {"preset": "tiny"},
            "data": {
                "sources": ["unused"],
                "directory": "unused",
                "method": "decompose",
                "decompose": {"shortest": 16},
                "blend": {"parts": parts, "stages": stages or []},
            },
            "curriculum": {"odds": "grow_p2", "cycles": cycles, **curriculum},
            "train": {"steps": STEPS, "tokens_per_step": STEP, "sequence_length": 256, "dtype": "fp32"},
        }
    )


def test_equal_shares_of_what_is_not_blended_are_equal_to_the_last_bit() -> None:
    tree = config_of({"short": {}}, mixture="equal").model_dump()
    tree["data"]["blend"] = None
    text = np.array([[7.0e5, 3.0e5, 1.1e5, 9.0e4, 5.0e4]])
    assert shares_of_stages(RunConfig.model_validate(tree), [""], text)[0].tolist() == [[1.0] * 5]


WEIGHTS = {"short": {"weight": 0.2}, "mixed": {"weight": 0.5}, "long": {"weight": 0.3}}


@pytest.mark.parametrize("mixture", ["natural", "equal", [4, 1, 1, 2, 2]])
def test_parts_have_their_weights_of_the_tokens(prepared: Prepared, mixture: Any) -> None:
    steps = training_steps(config_of(WEIGHTS, mixture=mixture), prepared)
    counts: Counter[str] = Counter()
    for step in range(STEPS):
        lengths = set()
        for sample in steps.samples(step):
            row = steps.row(sample)
            lengths.add(len(row.tokens))
            counts[list(LENGTHS)[int(row.tokens[0])]] += len(row.tokens)
        assert lengths == {steps.length(step)}
    taken = taken_of_parts(steps, STEPS)
    assert counts == {name: part.tokens for name, part in taken.items()}
    # Of each length the steps are whole, and so are the rows.
    for name, part in WEIGHTS.items():
        assert abs(counts[name] - part["weight"] * STEPS * STEP) < 5 * STEP / 2, (name, counts)


def test_within_a_length_parts_come_by_their_shares_in_every_step(prepared: Prepared) -> None:
    steps = training_steps(config_of(WEIGHTS), prepared)
    shares: dict[int, list[int]] = {}
    for step in range(STEPS):
        if steps.length(step) == 16:
            rows = [int(steps.row(sample).tokens[0]) for sample in steps.samples(step)]
            shares.setdefault(step, [rows.count(source) for source in range(3)])
    found = np.array(list(shares.values()))
    assert len(found) > 5
    assert (np.abs(found - found.mean(0)) <= 2).all()


def test_no_row_comes_twice_before_all_of_its_part_and_length_have_come(prepared: Prepared) -> None:
    steps = training_steps(config_of(WEIGHTS), prepared)
    for bucket in steps.buckets:  # type: ignore[attr-defined]
        taken: dict[str, list[int]] = {name: [] for name in bucket.parts}
        asked = {name: _Asked(part.rows, taken[name]) for name, part in bucket.parts.items()}
        for name, part in bucket.parts.items():
            object.__setattr__(part, "rows", asked[name])
        for sample in range(200):
            bucket.row(sample)
        for name, rows in taken.items():
            size = len(asked[name])
            for first in range(0, len(rows), size):
                assert len(set(rows[first : first + size])) == len(rows[first : first + size])


class _Asked:
    """Rows that note which ones were asked for."""

    def __init__(self, rows: Any, asked: list[int]) -> None:
        self.rows, self.asked, self.length = rows, asked, rows.length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        self.asked.append(row)
        return self.rows[row]


def test_without_weights_all_rows_come_equally_often(prepared: Prepared) -> None:
    """But for `epochs`, which parts share by as well."""
    steps = training_steps(
        config_of({"short": {"epochs": 30}, "mixed": {"epochs": 15}, "long": {"epochs": 15}}), prepared
    )
    taken = taken_of_parts(steps, STEPS)
    assert taken["mixed"].epochs == pytest.approx(taken["long"].epochs, rel=0.1)
    assert taken["short"].epochs == pytest.approx(2 * taken["mixed"].epochs, rel=0.1)


def test_stages_have_weights_of_their_own(prepared: Prepared) -> None:
    stages = [{"steps": 120, "weights": {"mixed": 1, "short": 1}}, {"weights": {"long": 3, "mixed": 1}}]
    steps = training_steps(config_of(WEIGHTS | {name: {} for name in WEIGHTS}, stages), prepared)
    half, whole = taken_of_parts(steps, 120), taken_of_parts(steps, STEPS)
    assert half["long"].tokens == 0
    assert half["short"].tokens == whole["short"].tokens == pytest.approx(60 * STEP, abs=3 * STEP)
    assert whole["long"].tokens == pytest.approx(90 * STEP, abs=3 * STEP)
    lengths = [steps.length(step) for step in range(STEPS)]
    assert np.mean(lengths[120:]) > 1.5 * np.mean(lengths[:120])  # as the text of each stage has them
    assert lengths[0] == 256


def test_parts_that_have_had_their_epochs_leave_their_share_to_others(prepared: Prepared) -> None:
    steps = training_steps(config_of({"short": {"weight": 0.5, "epochs": 1}, "mixed": {"weight": 0.5}}), prepared)
    taken = taken_of_parts(steps, STEPS)
    assert taken["short"].epochs <= 1
    assert taken["short"].epochs == pytest.approx(1, abs=0.05)
    assert taken["short"].tokens + taken["mixed"].tokens == STEPS * STEP


@pytest.mark.parametrize(
    ("parts", "curriculum", "said"),
    [
        (
            {name: {"epochs": 1} for name in WEIGHTS},
            {},
            r"data.blend has [\d,]+ rows of \d+ tokens.*: raise epochs in data.b",
        ),
        (
            {"mixed": {}, "long": {"epochs": 0.001}},
            {},
            "data.blend.parts.long.epochs 0.001 is less than one row of every",
        ),
        (
            {"short": {"max_tokens": 40}},
            {},
            "the text has 0 rows of train.sequence_length 256, and a step takes 4: low",
        ),
        (
            {"short": {"max_tokens": 60, "weight": 0.7}, "long": {"weight": 0.3}},
            {"mixture": "equal"},
            r"data.blend gives short 70.0% of the tokens, .* can have 40.0% with curriculum.mixture equal: lower its",
        ),
        (
            {"mixed": {}, "short": {"max_tokens": 16}},
            {},
            "data.blend.parts.short has no document of more than 16 tokens, which",
        ),
        ({"mixed": {"weight": 0}}, {}, "data.blend has no weight above 0: give one to some of mixed"),
    ],
)
def test_blends_that_the_text_does_not_do_for(
    prepared: Prepared, parts: dict[str, Any], curriculum: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        training_steps(config_of(parts, **curriculum), prepared)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [{"steps": 100, "weights": {"long": 1}}, {"weights": {"long": 1}}],
            r"data.blend.stages.0.steps 100 .* such as 120 ",
        ),
        (
            [{"steps": 120, "weights": {"long": 1}}],
            "data.blend.stages end after step 120, and train.steps is 240; leave",
        ),
    ],
)
def test_stages_are_whole_cycles(stages: list[Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of({"long": {}}, stages)


def test_what_is_said_of_a_blend_agrees(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule, the metrics, the lines at the start, and the statistics of a source."""
    monkeypatch.setattr("farspan.trainer.describe_schedule.load_prepared", lambda directory: prepared)
    config, lines = config_of(WEIGHTS), []
    describe_schedule(config, lines.append)
    steps = training_steps(config, prepared)
    record = StepRecord(STEPS, 0, 0, 0, 0, 0, 0, 256, 1)
    Mixture(steps).after_step(None, record)  # type: ignore[arg-type]
    by_length = {int(line.split()[0].replace(",", "")): line.split() for line in lines[2:7]}
    assert sum(int(row[4]) for row in by_length.values()) == STEPS
    table = {line.split()[0]: line.split() for line in lines[8:11]}
    assert list(table) == list(WEIGHTS)
    starts = dict(zip(WEIGHTS, describe_rows(config, steps), strict=True))
    lengths = Corpus(prepared, "train").lengths
    for name, (_, rows, tokens, rows_taken, tokens_taken, share, epochs) in table.items():
        assert int(rows_taken.replace(",", "")) == record.further[f"blend_rows_{name}"]
        assert int(tokens_taken.replace(",", "")) == record.further[f"blend_tokens_{name}"]
        assert float(epochs) == pytest.approx(record.further[f"blend_epochs_{name}"], abs=0.005)
        assert starts[name].startswith(
            f"data.method decompose: {name}: {rows} rows, {epochs} epochs in all, {share} of"
        )
        here = prepared.sources[name]["train"]
        words = [line.split() for line in describe_lengths(lengths, slice(here.start, here.stop), 16, 256, True, 3)]
        bucket = next(number for number, line in enumerate(words) if line[:1] == ["bucket"])
        found = [[int(word.replace(",", "")) for word in line[1:3]] for line in words[bucket + 1 : bucket + 6]]
        assert [sum(column) for column in zip(*found)] == [int(word.replace(",", "")) for word in (rows, tokens)]
