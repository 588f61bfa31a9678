"""What a rank is fed: the same samples on any mesh, whole rows over the context ranks, held-out rows once each."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from farspan.data.batch import Batch
from farspan.data.prepared import Prepared
from farspan.data.visibility import Window
from farspan.models.config import ModelConfig
from farspan.parallel import orders
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.parallel.verify import verify
from farspan.trainer.config import RunConfig
from farspan.trainer.feed import Feed
from farspan.trainer.first_rows import RunRows

LENGTH = 32
MODEL = ModelConfig.model_validate(
    {
        "vocabulary_size": 5000,
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "feed_forward_size": 48,
    }
)
# Rows of the held-out text that are whole.
HELDOUT_ROWS = 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Documents of odd lengths, every token of the corpus a different number."""
    directory = tmp_path_factory.mktemp("prepared")
    tokens = iter(range(5000))
    for split, lengths in (("train", [7, 45, 1, 130, 64, 33, 1, 200, 90]), ("heldout", [50, 1, 100, 20])):
        builder = IndexedDatasetBuilder(str(directory / f"{split}.bin"), dtype=np.uint16)
        for length in lengths:
            builder.add_document(np.array([next(tokens) for _ in range(length)]), [length])
        builder.finalize(str(directory / f"{split}.idx"))
    return Prepared(directory, directory / "tokenizer.model", "", 5000, 1, {}, {}, "")


class Place:
    """Stands for a process group: all that the feed asks is this process's place in it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


def feed_of(prepared: Prepared, degrees: Degrees, data_rank: int, context_rank: int, **changes: Any) -> Feed:
    sections: dict[str, Any] = {
        "run": {"dir": "runs/test", "seed": 4},
        "model": MODEL.model_dump(),
        "data": {"sources": ["none"], "directory": prepared.directory},
        "train": {"steps": 9, "tokens_per_step": 8 * LENGTH, "sequence_length": LENGTH, "dtype": "fp32"},
        "parallel": {"context": degrees.context, "stripe": 4},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    groups = {name: Place(0) for name in ("loss", "shard", "tensor", "control")}
    mesh = Mesh(
        degrees=degrees,
        device=torch.device("cpu"),
        batch=Place(data_rank),  # type: ignore[arg-type]
        context=Place(context_rank),  # type: ignore[arg-type]
        links={},
        **groups,  # type: ignore[arg-type]
    )
    config = RunConfig.model_validate(sections)
    return Feed(config, MODEL, RunRows.of(config, prepared), mesh)


def whole(order: orders.Order, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """One micro-batch again from its context ranks."""
    names = ("tokens", "labels", "rotary_positions")
    return {name: order.unshard([getattr(batch, name) for batch in batches]) for name in names}


@pytest.mark.parametrize(
    ("data", "context", "order", "micro_batch_rows"),
    [(1, 2, "zigzag", 1), (2, 1, "contiguous", 2), (4, 3, "striped", 1), (2, 2, "contiguous", 1), (4, 2, "zigzag", 2)],
)
def test_a_step_holds_the_same_samples_on_any_mesh(
    prepared: Prepared, data: int, context: int, order: str, micro_batch_rows: int
) -> None:
    alone = feed_of(prepared, Degrees(1, 1, 1), 0, 0)
    degrees = Degrees(data, context, 1)
    changes = {"parallel": {"context": context, "stripe": 4, "order": order}}
    changes["train"] = {"micro_batch_rows": micro_batch_rows}
    feeds = [[feed_of(prepared, degrees, d, c, **changes) for c in range(context)] for d in range(data)]
    for step in range(4):  # more than an epoch
        expected = alone.training_batches(step)
        assert [batch.samples for batch in expected] == [(step * 8 + i,) for i in range(8)]
        by_rank = [[feed.training_batches(step) for feed in row] for row in feeds]
        rows: dict[int, dict[str, torch.Tensor]] = {}
        for d, micro_batch in product(range(data), range(8 // (data * micro_batch_rows))):
            batches = [by_rank[d][c][micro_batch] for c in range(context)]
            assert len({batch.samples for batch in batches}) == 1
            found = whole(batches[0].order, batches)
            for place, sample in enumerate(batches[0].samples):
                assert sample not in rows
                rows[sample] = {name: tensor[place] for name, tensor in found.items()}
        assert sorted(rows) == [step * 8 + i for i in range(8)]
        for batch in expected:
            for name, tensor in rows[batch.samples[0]].items():
                assert torch.equal(tensor, getattr(batch, name)[0]), (step, batch.samples, name)
        valid = sum(batch.valid for row in by_rank for rank in row for batch in rank)
        assert valid == sum(batch.valid for batch in expected)


def test_labels_are_the_next_tokens_of_the_text(prepared: Prepared) -> None:
    """Tokens count up in this corpus, so a label is its token + 1 until the document ends."""
    batches = feed_of(prepared, Degrees(1, 1, 1), 0, 0).training_batches(0)
    seen: Counter[int] = Counter()
    for batch in batches:
        labelled = batch.labels != -100
        assert torch.equal(batch.labels[labelled], batch.tokens[labelled] + 1)
        # A document's last token has no label, and where there is none the next slot begins a document.
        assert bool((batch.rotary_positions[:, 1:][~labelled[:, :-1]] == 0).all())
        seen.update(batch.tokens.flatten().tolist())
    assert max(seen.values()) == 1


def test_across_documents_is_passed_on(prepared: Prepared) -> None:
    def positions(across: bool) -> torch.Tensor:
        feed = feed_of(prepared, Degrees(1, 1, 1), 0, 0, attention={"across_documents": across})
        return torch.cat([batch.rotary_positions for batch in feed.training_batches(0)])

    assert torch.equal(positions(True), torch.arange(LENGTH).expand(8, LENGTH))
    assert not torch.equal(positions(False), positions(True))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("data", [1, 2, 4, 8])
def test_held_out_rows_count_once_on_any_number_of_ranks(prepared: Prepared, data: int, rows: int) -> None:
    used = min(rows, HELDOUT_ROWS)
    reference = feed_of(prepared, Degrees(1, 1, 1), 0, 0)
    degrees = Degrees(data, 2, 1)
    counts, found = [], {}
    for data_rank in range(data):
        feeds = [feed_of(prepared, degrees, data_rank, c, eval={"rows": rows}) for c in range(2)]
        micro_batches = list(zip(*(feed.heldout_batches() for feed in feeds), strict=True))
        counts.append(len(micro_batches))
        for batches in micro_batches:
            together = whole(batches[0].order, list(batches))
            assert together["tokens"].shape == (1, LENGTH)
            valid = sum(batch.valid for batch in batches)
            assert valid == int((together["labels"] != -100).sum())
            if valid:
                assert batches[0].samples not in found
                found[batches[0].samples] = together
            else:
                assert batches[0].samples[0] >= used
    # Every rank goes through the model equally often, or the others would wait for it for ever.
    assert counts == [-(-used // data)] * data
    assert sorted(found) == [(i,) for i in range(used)]
    for (i,), together in found.items():
        assert torch.equal(together["tokens"][0], torch.from_numpy(reference.heldout[i].tokens))
        assert torch.equal(together["labels"][0], torch.from_numpy(reference.heldout[i].labels))


@pytest.mark.parametrize("plan", ["ring", "all_gather"])
def test_context_ranks_derive_the_same_plan_of_their_batch(prepared: Prepared, plan: str) -> None:
    changes = {"parallel": {"context": 3, "plan": plan}, "train": {"micro_batch_rows": 2}}
    feeds = [feed_of(prepared, Degrees(1, 3, 1), 0, c, **changes) for c in range(3)]
    digests = []
    for step in range(2):
        made = [feed.decoder_input(feed.training_batches(step)[0]) for feed in feeds]
        digests.append({prepared.plan.digest() for batch in made for prepared in batch.plans})
        for rank, (feed, batch) in enumerate(zip(feeds, made)):
            (prepared_plan,) = set(batch.plans)
            assert len(batch.plans) == feed.config.model.layers
            assert prepared_plan.rank == rank
            assert prepared_plan.plan.name == plan
            assert prepared_plan.plan.heads == (4, 2)
            assert batch.group is feed.mesh.links
            slots = feed.longest.arrangement.order().slots
            assert batch.tokens.shape == batch.labels.shape == batch.rotary_positions.shape == (2, slots)
    assert [len(found) for found in digests] == [1, 1]


def test_layers_have_the_plan_of_what_they_see(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the first of two layers has a window; `auto` chooses for each kind of layer by itself."""
    monkeypatch.setattr("farspan.kernels.triton.backend._INTERPRETED", False)  # as on a GPU
    changes = {
        "parallel": {"context": 2, "plan": "auto"},
        "attention": {"window": {"width": 4, "full_layers": [1]}, "across_documents": True},
    }
    feed = feed_of(prepared, Degrees(1, 2, 1), 0, 0, **changes)
    narrow, full = feed.longest.arrangement.layers
    assert (narrow.window, full.window) == (Window(4), None)
    batch = feed.training_batches(0)[0]
    assert batch.masks[narrow].area() == 4 * LENGTH - 6
    assert batch.masks[full].area() == LENGTH * (LENGTH + 1) // 2
    for seen, made in zip((narrow, full), feed.decoder_input(batch).plans, strict=True):
        reason = feed.longest.plans[seen].reason
        assert reason is not None
        assert reason.startswith(f"for {seen.in_words}, parallel.plan auto is {made.plan.name}: ")
        verify(made.plan, batch.order, batch.masks[seen])
