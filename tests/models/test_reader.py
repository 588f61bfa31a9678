"""Reading, scoring and decoding over a shared cache equal the decoder's plain forward pass over the whole text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor

from farspan.kernels import IntervalMask, masks
from farspan.models import prefill
from farspan.models.config import ModelConfig
from farspan.models.decoder import Decoder, DecoderInput
from farspan.models.layers import Sharding
from farspan.models.prefill import Share
from farspan.models.reader import Reader
from farspan.parallel import orders, plans
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.parallel.prepare import prepare
from farspan.parallel.shared_keys import merge_over

pytestmark = pytest.mark.distributed

VOCABULARY, CONTEXT, MORE = 66, 61, 9
# Blocks that divide among four ranks or do not, that the text ends within; one leaves ranks without any block.
STARS = ((8, 8), (5, 2), (20, 7), (40, 1))
CONFIG = ModelConfig.model_validate(
    {
        "vocabulary_size": VOCABULARY,
        "hidden_size": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "feed_forward_size": 48,
        "qk_norm": True,
        "initializer_std": 0.3,
    }
)
TEXT = np.random.default_rng(5).integers(0, VOCABULARY, CONTEXT + MORE).tolist()


def decoder(tensor: int = 1) -> Decoder:
    return Decoder(CONFIG, Sharding(tensor, seed=4), loss_chunk_tokens=7).double().requires_grad_(False)


def plain_losses(model: Decoder, rows: Tensor, labels: Tensor, mask: IntervalMask) -> Tensor:
    """`[rows, tokens]`: one rank's forward pass over whole rows."""
    length, tensor = rows.shape[1], model.sharding.tensor
    order = orders.contiguous(length, 1)
    plan = plans.build("single", order, mask, (CONFIG.heads // tensor, CONFIG.kv_heads // tensor))
    positions = torch.arange(length).expand_as(rows)
    _, losses = model(DecoderInput(rows, labels, positions, [prepare(plan, order, mask, 0)] * CONFIG.layers, None))
    return losses


def ways(mesh: Mesh) -> Iterator[tuple[str, Share, IntervalMask]]:
    """Every way to read the context, with the mask of the whole text that it stands for."""
    heads = (CONFIG.heads // mesh.degrees.tensor, CONFIG.kv_heads // mesh.degrees.tensor)
    whole = CONTEXT + MORE
    yield "dense", prefill.dense(CONTEXT, mesh, heads), masks.causal(whole)
    for block, anchor in STARS:
        mask = masks.star(whole, block, anchor, [CONTEXT])
        yield f"star {block}", prefill.star(CONTEXT, block, anchor, mesh, heads), mask
        yield f"replicated {block}", prefill.star_replicated(CONTEXT, block, anchor, mesh, heads), mask


def check_scores(rank: int, world: int, tensor: int) -> dict[str, float]:
    mesh = Mesh.create(Degrees(1, world // tensor, tensor), torch.device("cpu"))
    found = {}
    try:
        model = decoder(tensor)
        rows = torch.tensor(TEXT)[None]
        for name, share, mask in ways(mesh):
            expected = -plain_losses(
                model, rows[:, :-1], rows[:, 1:], mask.at(range(len(TEXT) - 1), range(len(TEXT) - 1))
            )
            reader = Reader(model, mesh)
            reader.prefill(TEXT[:CONTEXT], share)
            held = torch.tensor([cache.tokens for cache in reader.caches])
            assert len(held.unique()) == 1
            dist.all_reduce(held, group=mesh.context)
            assert held.tolist() == [CONTEXT] * CONFIG.layers
            before = reader.caches[0].tokens
            scores = torch.cat([reader.score(TEXT[CONTEXT : CONTEXT + 5]), reader.score(TEXT[CONTEXT + 5 :])])
            grown = reader.caches[0].tokens - before
            assert grown == (MORE if mesh.context_rank == mesh.degrees.context - 1 else 0)
            found[name] = float((scores - expected[0, CONTEXT - 1 :]).abs().max())
            for length in (CONTEXT - 1, len(TEXT) + 1):
                with pytest.raises(ValueError, match=f"goes back to {CONTEXT} to {len(TEXT)} tokens, not to {length}"):
                    reader.back_to(length)
            reader.back_to(CONTEXT)
            with pytest.raises(ValueError, match="not since the reader went back"):
                reader.next_logits()
            reader.read(TEXT[CONTEXT : CONTEXT + 5])
            again = reader.score(TEXT[CONTEXT + 5 :])
            assert float((again - scores[5:]).abs().max()) < 1e-9
            assert reader.caches[0].tokens == before + grown
    finally:
        mesh.destroy()
    return found


@pytest.mark.parametrize(("world", "tensor"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_scores_are_those_of_the_whole_text(pool: Pool, world: int, tensor: int) -> None:
    for found in pool.run(world, check_scores, tensor):
        assert len(found) == 1 + 2 * len(STARS)
        assert {name: error for name, error in found.items() if not error < 1e-9} == {}


def check_greedy(rank: int, world: int, tensor: int, steps: int) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens decoded, and the argmax of full forward passes: all labels of the last token in one batch."""
    mesh = Mesh.create(Degrees(1, world // tensor, tensor), torch.device("cpu"))
    found = {}
    try:
        model = decoder(tensor)
        for name, share, _ in list(ways(mesh))[:3]:
            reader = Reader(model, mesh)
            reader.prefill(TEXT[:CONTEXT], share)
            reader.read(TEXT[CONTEXT:])
            got = list(reader.decode(steps))
            text, wanted = list(TEXT), []
            for _ in range(steps):
                length = len(text)
                mask = masks.causal(length) if name == "dense" else masks.star(length, *STARS[0], [CONTEXT])
                labels = torch.full((VOCABULARY, length), -100)
                labels[:, -1] = torch.arange(VOCABULARY)
                losses = plain_losses(model, torch.tensor([text] * VOCABULARY), labels, mask)
                wanted.append(int(losses[:, -1].argmin()))
                text.append(wanted[-1])
            found[name] = (got, wanted)
    finally:
        mesh.destroy()
    return found


@pytest.mark.parametrize(("world", "tensor"), [(1, 1), (2, 1), (4, 1), pytest.param(4, 2, marks=pytest.mark.full)])
def test_greedy_decoding_is_the_argmax_of_full_forward_passes(pool: Pool, world: int, tensor: int) -> None:
    for found in pool.run(world, check_greedy, tensor, 6):
        assert list(found) == ["dense", "star 8", "replicated 8"]
        for name, (got, wanted) in found.items():
            assert got == wanted, name


def draw(rank: int, world: int, temperature: float, seed: int, stop: int | None) -> list[int]:
    mesh = Mesh.create(Degrees(1, world, 1), torch.device("cpu"))
    try:
        reader = Reader(decoder(), mesh)
        reader.prefill(TEXT[:CONTEXT], prefill.dense(CONTEXT, mesh, (CONFIG.heads, CONFIG.kv_heads)))
        # What other ranks would draw is another sequence, and does not matter.
        return list(reader.decode(8, temperature, torch.Generator().manual_seed(seed + 100 * rank), stop))
    finally:
        mesh.destroy()


def test_all_ranks_go_on_with_the_token_that_the_first_one_draws(pool: Pool) -> None:
    first, second = pool.run(2, draw, 1.0, 0, None)
    assert first == second
    assert first == pool.run(1, draw, 1.0, 0, None)[0]
    assert first != pool.run(1, draw, 1.0, 1, None)[0]
    assert len(first) == 8
    stop = first[3]
    assert pool.run(2, draw, 1.0, 0, stop)[0] == first[: first.index(stop)]
    assert pool.run(1, draw, 1e-6, 0, None) == pool.run(1, draw, 0.0, 0, None)


def check_replicas(rank: int, world: int) -> list[tuple[int, int, int]]:
    """Moves of the plan, tokens computed, and tokens kept."""
    mesh = Mesh.create(Degrees(1, world, 1), torch.device("cpu"))
    try:
        shares = [way(64, 16, 16, mesh, (4, 2)) for way in (prefill.star, prefill.star_replicated)]
        assert shares[1].group is None
        return [(len(share.plan.plan.forward.moves), len(share.positions), len(share.kept)) for share in shares]
    finally:
        mesh.destroy()


def test_replicas_of_the_anchor_take_the_place_of_sends(pool: Pool) -> None:
    sent, computed = zip(*pool.run(4, check_replicas))
    assert set(sent) == {(3, 16, 16)}  # the anchor goes to three ranks
    assert computed == ((0, 16, 16), *[(0, 32, 16)] * 3)


def check_merge(rank: int, world: int) -> list[float]:
    out = torch.full((1, 1, 3, 2), float(rank + 1))
    none = -torch.inf
    lse = torch.tensor([[[none], [none], [none]], [[0.0], [1e4], [none]]][min(rank, 1)])[None]
    return merge_over(out, lse, dist.group.WORLD).flatten().tolist()


def test_merging_is_safe_for_ranks_that_see_nothing(pool: Pool) -> None:
    for found in pool.run(2, check_merge):
        assert found == [2, 2, 2, 2, 0, 0]


def check_refusals(rank: int, world: int) -> list[str]:
    mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
    messages = []
    try:
        reader = Reader(decoder(), mesh)
        share = prefill.dense(5, mesh, (4, 2))
        for call in (reader.next_logits, lambda: reader.score([1]), lambda: reader.prefill([1, 2], share)):
            with pytest.raises(ValueError, match=" ") as caught:
                call()
            messages.append(str(caught.value))
    finally:
        mesh.destroy()
    return messages


def test_nothing_is_read_out_of_turn(pool: Pool) -> None:
    (messages,) = pool.run(1, check_refusals)
    assert messages[:2] == ["nothing was read, or not since the reader went back, so nothing can follow it"] * 2
    assert messages[2] == "a reader begins with all 5 tokens of its share, not 2 of them"
