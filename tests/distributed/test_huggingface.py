"""Unmodified Hugging Face models give the loss and the gradients of one process, however many ranks share a row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn

from farspan.parallel import BatchSharder, attention_function, attention_mask

pytestmark = pytest.mark.distributed

LENGTH, VOCABULARY, IGNORED = 45, 67, -100
DOCUMENTS = [0, 1, 20, 45]
TOLERANCE = 1e-6
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def make_model(family: str, attention: str, **changes: Any) -> nn.Module:
    """Random weights, the same at every call. In fp64; transformers' norms and loss are in fp32 even so."""
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("farspan", attention_function)
    AttentionMaskInterface.register("farspan", attention_mask)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(3)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=attention)
    return model.double().train()


def make_rows(rows: int) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some are not to be predicted: unevenly many on the ranks."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[:, 3:19] = IGNORED
    return tokens, labels


def one_process(model: nn.Module, packed: bool) -> Tensor:
    """Loss of the whole rows, in transformers' own way: it finds documents by positions that start anew."""
    tokens, labels = make_rows(1 if packed else 2)
    if not packed:
        loss: Tensor = model(tokens, labels=labels, use_cache=False).loss
        return loss
    labels[:, DOCUMENTS[:-1]] = IGNORED
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(DOCUMENTS)])[None]
    packed_loss: Tensor = model(tokens, position_ids=positions, labels=labels, use_cache=False).loss
    return packed_loss


def shared_loss(model: nn.Module, packed: bool, plan: str, order: str) -> Tensor:
    sharder = BatchSharder(dist.group.WORLD, plan=plan, order=order, stripe=4)
    tokens, labels = make_rows(1 if packed else 2)
    documents = torch.tensor(DOCUMENTS, dtype=torch.int32) if packed else None
    loss: Tensor = model(**sharder(tokens, labels, cu_seqlens=documents)).loss
    return loss


def differences(
    rank: int, world: int, family: str, changes: dict[str, Any], cases: list[tuple[bool, str, str]], recompute: bool
) -> list[float]:
    """For each case the largest difference in loss and gradients, each relative to its largest value."""
    results = []
    for packed, plan, order in cases:
        reference, model = make_model(family, "sdpa", **changes), make_model(family, "farspan", **changes)
        if recompute:
            model.activation_checkpointing_enable()  # type: ignore[operator]
        expected, loss = one_process(reference, packed), shared_loss(model, packed, plan, order)
        expected.backward()
        loss.backward()
        total = loss.detach()
        dist.all_reduce(total)
        worst = float((total - expected.detach()).abs() / expected.detach())
        for (name, wanted), got in zip(reference.named_parameters(), model.parameters()):
            assert wanted.grad is not None, name
            assert got.grad is not None, name
            dist.all_reduce(got.grad)
            worst = max(worst, float((got.grad - wanted.grad).abs().max() / wanted.grad.abs().max()))
        results.append(worst)
    return results


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_loss_and_gradients_equal_those_of_one_process(pool: Pool, family: str, world: int) -> None:
    cases = [
        (packed, plan, order)
        for packed in (False, True)
        for plan, order in (("ring", "zigzag"), ("all_gather", "striped"), ("ring", "contiguous"))
    ]
    worst = max(max(found) for found in pool.run(world, differences, family, {}, cases, False))
    print(f"largest relative difference {worst:.1e}")
    assert worst < TOLERANCE


def test_sliding_window_layers_beside_full_ones(pool: Pool) -> None:
    cases = [(False, "ring", "zigzag"), (True, "all_gather", "zigzag")]
    assert max(max(found) for found in pool.run(2, differences, "Qwen2", WINDOWS, cases, False)) < TOLERANCE


def test_gradient_checkpointing_computes_attention_again(pool: Pool) -> None:
    assert (
        max(max(found) for found in pool.run(2, differences, "Llama", {}, [(True, "ring", "zigzag")], True)) < TOLERANCE
    )


def test_the_data_parallel_loss_is_divided_by_the_count_of_the_whole_step() -> None:
    """Two micro-batches of unequal label counts, one after the other: the sum is the mean over both."""
    model, sharder = make_model("Llama", "farspan"), BatchSharder(None)
    tokens, labels = make_rows(2)
    labels[1, 10:30] = IGNORED
    count = int((labels[:, 1:] != IGNORED).sum())
    rows = [sharder(tokens[i : i + 1], labels[i : i + 1], num_items_in_batch=count) for i in range(2)]
    together = model(**sharder(tokens, labels)).loss
    torch.testing.assert_close(sum(model(**row).loss for row in rows), together)


def test_all_layers_and_batches_of_one_shape_share_a_plan() -> None:
    model, sharder = make_model("Llama", "farspan"), BatchSharder(None)
    for _ in range(3):
        model(**sharder(*make_rows(1)))
        model(**sharder(*make_rows(1), cu_seqlens=DOCUMENTS))
    assert sharder.plans._prepared.cache_info().misses == 2


def test_what_is_not_computed_is_refused() -> None:
    model, sharder = make_model("Llama", "farspan"), BatchSharder(None)
    tokens, labels = make_rows(2)
    batch = sharder(tokens, labels)

    def refused(message: str, model: nn.Module = model, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **changes})

    refused(r"needs what BatchSharder makes: model\(\*\*sharder\(input_ids\)\)", farspan=None)
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    refused("an attention_mask with zeros", attention_mask=padded)
    refused("an attention_mask: leave it out", attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    refused("is_causal=False", is_causal=False)
    refused("attention_dropout 0.1", make_model("Llama", "farspan", attention_dropout=0.1))
    refused("softcap", softcap=30.0)
    refused("cu_seq_lens_q: give the documents to BatchSharder", cu_seq_lens_q=torch.tensor(DOCUMENTS))
    short = {key: batch[key][:, 1:] for key in ("input_ids", "position_ids")}
    refused("gives each rank 46 of 45 tokens, but attention got 45", labels=None, **short)
    with pytest.raises(ValueError, match="into one row, but input_ids has 2"):
        sharder(tokens, labels, cu_seqlens=DOCUMENTS)
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 45"):
        sharder(tokens[:1], labels[:1], cu_seqlens=[0, 44])
    with pytest.raises(ValueError, match="plan is 'rings'; possible are"):
        BatchSharder(None, plan="rings")
    with pytest.raises(ValueError, match="attention_chunk_size"):
        attention_mask(1, 8, 8, local_size=4, config=model.config)
    with pytest.raises(ValueError, match="or_mask_function"):
        attention_mask(1, 8, 8, use_vmap=True)
    model(**{**batch, "attention_mask": torch.ones_like(tokens)})
