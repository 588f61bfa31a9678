"""Ways of making rows by configuration: which documents they hold, that blends are counted, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.prepare import prepare
from farspan.data.prepared import Prepared
from farspan.data.sources import Source
from farspan.data.text import standard_library
from farspan.parallel.degrees import Degrees
from farspan.trainer.blended import parts_of, taken_of_parts
from farspan.trainer.callbacks.mixture import Mixture
from farspan.trainer.checkpoint.state import RunState
from farspan.trainer.checkpoint.store import CheckpointStore
from farspan.trainer.compare import compare
from farspan.trainer.config import RunConfig
from farspan.trainer.documents import training_documents
from farspan.trainer.first_rows import whole_rows
from farspan.trainer.packing import describe_rows, heldout_rows, packed_steps
from farspan.trainer.trainer import StepRecord

LENGTH = 512


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two sources: `notes`, of many short documents, and `code`, of few that are long."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("notes", "code"):
        (folder / name).mkdir()
    files = [document.path for document in standard_library() if 1000 < document.path.stat().st_size < 50_000]
    for number, path in enumerate(files[:24]):
        text, size = path.read_text(), 40 * (number + 1)
        (folder / "code" / f"{number:02d}.py").write_text(text)
        for line in range(6):
            (folder / "notes" / f"{number:02d}_{line}.txt").write_text(text[line * 100 : line * 100 + size])
    return prepare(
        [Source(str(folder / "notes")), Source(str(folder / "code"))],
        folder / "prepared",
        tokenizer=None,
        vocabulary_size=400,
        heldout_fraction=0.1,
        seed=1,
        report=lambda line: None,
    )


def config_of(prepared: Prepared, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 3},
        "model": {"preset": "tiny"},
        "data": {"sources": ["unused"], "directory": str(prepared.directory)},
        "train": {"steps": 10, "sequence_length": LENGTH, "tokens_per_step": 4 * LENGTH, "dtype": "fp32"},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("method", ["concat", "best_fit", "padded"])
def test_methods_make_rows_of_the_same_documents(prepared: Prepared, method: str) -> None:
    config = config_of(prepared, data={"method": method})
    steps, text = packed_steps(config, prepared), Corpus(prepared, "train")
    assert steps.lengths == (LENGTH,)
    row = steps.row(steps.samples(3)[2])
    assert len(row.tokens) == LENGTH
    (line,) = describe_rows(config, steps) or [""]
    assert line.startswith(f"data.method {method}: ") == (method != "concat")
    if method == "padded":
        assert len(row.cu_seqlens) <= 3
    if method == "best_fit":
        least = -(-int(text.lengths.sum()) // LENGTH)
        rows = int(re.findall(r"([\d,]+) rows", line)[0].replace(",", ""))
        assert least <= rows <= 1.05 * least + 1


def test_held_out_text_is_the_same_for_all_methods(prepared: Prepared) -> None:
    plain = heldout_rows(config_of(prepared), prepared)
    for method in ("best_fit", "padded"):
        other = heldout_rows(config_of(prepared, data={"method": method}), prepared)
        assert len(other) == len(plain)
        assert np.array_equal(other[0].tokens, plain[0].tokens)


def test_a_growing_window_divides_the_rows_of_early_steps(prepared: Prepared) -> None:
    window = {"start": 16, "steps": 8}
    steps = packed_steps(config_of(prepared, data={"growing_window": window}), prepared)
    plain = packed_steps(config_of(prepared), prepared)
    for step in (0, 4, 8):
        for sample in steps.samples(step):
            row, whole = steps.row(sample), plain.row(sample)
            assert np.array_equal(row.labels, whole.labels)
            assert (len(row.cu_seqlens) > len(whole.cu_seqlens)) == (step < 8)


def blended(prepared: Prepared, parts: dict[str, Any], stages: list[Any] | None = None, **data: Any) -> RunConfig:
    return config_of(prepared, data={"blend": {"parts": parts, "stages": stages or []}, **data})


def test_a_blend_takes_shares_of_sources_and_of_their_long_documents(prepared: Prepared) -> None:
    parts = {
        "notes": {"weight": 0.5},
        "long": {"source": "code", "min_tokens": 2000, "weight": 0.25},
        "short": {"source": "code", "max_tokens": 1999, "weight": 0.25},
    }
    config = blended(prepared, parts, method="best_fit")
    documents = training_documents(config, prepared)
    lengths = Corpus(prepared, "train").lengths
    code = prepared.sources["code"]["train"]
    assert len(documents["long"].lengths) + len(documents["short"].lengths) == len(code)
    assert documents["long"].lengths.min() >= 2000 > documents["short"].lengths.max()
    assert documents["notes"].lengths.sum() + lengths[code.start : code.stop].sum() == lengths.sum()

    steps = packed_steps(config, prepared)
    taken = taken_of_parts(steps, 1000)
    # Rows of notes are nearly as full as others.
    assert taken["notes"].rows == pytest.approx(2000, rel=0.1)
    assert taken["long"].rows == pytest.approx(taken["short"].rows, rel=0.1)
    tokens = sum(part.tokens for part in taken.values())
    assert taken["notes"].tokens / tokens == pytest.approx(0.5, abs=0.001)
    lines = describe_rows(config, steps)
    assert [line.split(": ")[1] for line in lines] == ["notes", "long", "short"]

    record = StepRecord(5, 0, 0, 0, 0, 0, 0, LENGTH, 1)
    Mixture(steps).after_step(None, record)  # type: ignore[arg-type]
    assert sum(value for name, value in record.further.items() if name.startswith("blend_rows_")) == 20
    assert record.further["blend_epochs_long"] == taken_of_parts(steps, 5)["long"].epochs


def test_without_weights_parts_share_by_their_tokens_and_epochs(prepared: Prepared) -> None:
    config = blended(prepared, {"notes": {"epochs": 3}, "code": {}})
    steps = packed_steps(config, prepared)
    rows = {name: len(part.rows) for name, (part,) in parts_of(steps).items()}
    taken = taken_of_parts(steps, (3 * rows["notes"] + rows["code"]) // 4)
    assert taken["notes"].rows == pytest.approx(3 * rows["notes"], abs=4)


def test_stages_change_weights_by_steps(prepared: Prepared) -> None:
    stages = [{"steps": 4, "weights": {"notes": 1}}, {"weights": {"code": 3, "notes": 1}}]
    steps = packed_steps(blended(prepared, {"notes": {}, "code": {}}, stages), prepared)
    rows = [{name: part.rows for name, part in taken_of_parts(steps, done).items()} for done in (4, 10)]
    assert rows == [{"notes": 16, "code": 0}, {"notes": 22, "code": 18}]


@pytest.mark.parametrize(
    ("parts", "stages", "said"),
    [
        ({"notez": {}}, [], "data.blend.parts.notez has the name of a source, 'notez', which data.directory does not"),
        (
            {"a": {"source": "b"}},
            [],
            "parts.a.source is 'b', .* set data.blend.parts.a.source to one of notes",
        ),
        (
            {"notes": {"min_tokens": 10**6}},
            [],
            "parts.notes has no document of 1,000,000 tokens or more among .*, of which the longest has",
        ),
        ({"notes": {"epochs": 0.1}}, [], "data.blend has .* rows of 512 tokens, and train.steps take 40"),
        (
            {"notes": {}, "code": {}},
            [{"weights": {"notes": 0}}],
            "give some of notes, code a weight above 0",
        ),
    ],
)
def test_blends_that_the_text_does_not_do_for(prepared: Prepared, parts: Any, stages: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        packed_steps(blended(prepared, parts, stages), prepared)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"overlong": "drop"}, "data.overlong drop does nothing with data.method concat"),
        ({"blend": {"parts": {}}}, "data.blend.parts|at least 1 item"),
        ({"blend": {"parts": {"a": {}}, "stages": [{"weights": {"b": 1}}]}}, "name 'b'.* data.blend.parts are a"),
        (
            {"blend": {"parts": {"a": {}}, "stages": [{"weights": {"a": 1}}, {"weights": {"a": 1}}]}},
            "only the last one can do without steps",
        ),
        ({"blend": {"parts": {"a": {"weight": 1}, "b": {}}}}, "a has a weight and b has none; give one to all"),
        (
            {"blend": {"parts": {"a": {"weight": 1}}, "stages": [{"weights": {"a": 1}}]}},
            "data.blend.parts.a.weight does nothing beside data.blend.stages",
        ),
        ({"growing_window": {"start": LENGTH, "steps": 5}}, "data.growing_window.start 512 is not less than"),
        ({"growing_window": {"steps": 5}, "method": "decompose"}, "does not go with data.method decompose"),
    ],
)
def test_configurations_that_contradict_themselves(prepared: Prepared, data: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of(prepared, data=data)


def test_a_growing_window_does_not_go_across_documents(prepared: Prepared) -> None:
    with pytest.raises(ValidationError, match=r"does not go with attention\.across_documents; leave one out"):
        config_of(prepared, data={"growing_window": {"steps": 5}}, attention={"across_documents": True})


def test_a_run_is_resumed_with_the_same_rows_only(prepared: Prepared, tmp_path: Path) -> None:
    def identity(**data: Any) -> dict[str, Any]:
        config = config_of(prepared, data=data)
        return RunState(CheckpointStore(tmp_path, 1), config, config.model, Degrees(1, 1, 1), prepared).identity

    parts = {"notes": {"weight": 1}, "code": {"weight": 2}}
    found = identity(method="best_fit", blend={"parts": parts})
    others = [
        identity(method="padded", blend={"parts": parts}),
        identity(method="best_fit", overlong="drop", blend={"parts": parts}),
        identity(method="best_fit", blend={"parts": parts | {"code": {"weight": 3}}}),
        identity(method="best_fit", blend={"parts": {"code": {"weight": 2}, "notes": {"weight": 1}}}),
        identity(method="best_fit"),
    ]
    changed = [{key for key in {**found, **other} if found.get(key) != other.get(key)} for other in others]
    assert changed == [
        {"data.method"},
        {"data.overlong"},
        {"data.blend.parts.code"},
        {"data.blend.parts (in order)"},
        {"data.blend.parts (in order)", "data.blend.parts.notes", "data.blend.parts.code", "data.blend.stages"},
    ]
    bare = {"notes": {}, "code": {}}
    weights = {"notes": 1.0, "code": 2.0}
    begun, extended, other = (
        identity(method="best_fit", blend={"parts": bare, "stages": [{"steps": first, "weights": weights}, last]})
        for first, last in (
            (2, {"steps": 1000, "weights": weights}),
            (2, {"steps": 2000, "weights": weights}),
            (3, {"steps": 1000, "weights": weights}),
        )
    )
    assert begun == extended != other
    # What tokens see may change, and so may how long a run is.
    assert identity(growing_window={"steps": 5}) == identity()


def test_plans_are_judged_by_rows_that_a_window_does_not_cut(prepared: Prepared) -> None:
    growing = config_of(prepared, data={"growing_window": {"start": 32, "steps": 5}})
    narrow, whole = packed_steps(growing, prepared), packed_steps(config_of(prepared), prepared)
    for seen, row in zip(whole_rows(narrow, 2), (whole.row(0), whole.row(1)), strict=True):
        assert np.array_equal(seen.cu_seqlens, row.cu_seqlens)
    assert len(narrow.row(0).cu_seqlens) > LENGTH // 32


def test_methods_are_compared_in_a_table(prepared: Prepared) -> None:
    lines: list[str] = []
    compare(config_of(prepared, data={"growing_window": {"steps": 8}}), lines.append)
    names = ["concat ", "concat, across documents", "best_fit, split", "padded, split", "decompose"]
    assert all(line.startswith(name) for line, name in zip(lines[2:], names))
    shares = dict(zip(names, lines[2:]))
    assert "0.00%" in shares["best_fit, split"]
    assert lines[7].startswith("mean context of concat with data.growing_window, by step: 0: ")
    assert lines[8].startswith("padding: ")
