"""An unmodified Megatron GPTModel gives the logits, loss and gradients of one process on every mesh."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from support.pool import Pool
from torch import Tensor, nn

from farspan.models.megatron import CoreAttention, core_attention_spec
from farspan.parallel import orders
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh

pytestmark = pytest.mark.distributed

LENGTH, VOCABULARY, IGNORED = 48, 64, -100
# Each a multiple of 2 x 4, as Megatron's packed format wants of its documents.
DOCUMENTS = [0, 8, 32, 48]
# What is left of them without their last tokens, which pad them; and the padding as documents of its own.
UNPADDED = [0, 5, 29, 42]
WITH_PADDING = [0, 5, 8, 32, 45, 48]
CASE = {"position": "none", "groups": 2, "plan": "ring", "order": "zigzag", "packed": None}


class DenseAttention(nn.Module):
    """Megatron's place for attention, in full matrices: its own implementations need a GPU."""

    documents: ClassVar[list[int]] = [0, LENGTH]

    def __init__(self, config: TransformerConfig, layer_number: int, **others: Any) -> None:
        super().__init__()
        windowed = config.window_size is not None and layer_number % config.window_attn_skip_freq != 0
        self.window = config.window_size[0] if windowed else LENGTH
        self.scale = others["softmax_scale"] or (config.hidden_size / config.num_attention_heads) ** -0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **others: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        row, column = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
        document = torch.bucketize(torch.arange(LENGTH), torch.tensor(self.documents), right=True)
        hidden = (column > row) | (row - column > self.window) | (document[:, None] != document[None])
        scores = (q @ k.transpose(2, 3) * self.scale).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def make_config(context: int, tensor: int, **changes: Any) -> TransformerConfig:
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": tensor,
        "context_parallel_size": context,
        "init_method_std": 0.3,
        "attention_softmax_in_fp32": True,
        "add_qkv_bias": True,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**(settings | changes))


def make_model(config: TransformerConfig, position: str, attention: Any, dtype: torch.dtype) -> GPTModel:
    """Initialised as a whole and then cut: the same weights on every mesh."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = attention
    torch.manual_seed(3)
    return GPTModel(config, layer, VOCABULARY, LENGTH, position_embedding_type=position).to(dtype)


def make_batch(packed: str | None) -> dict[str, Tensor]:
    """Tokens, their positions, and labels shifted already, of which some are not to be predicted."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (1 if packed else 2, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(len(tokens), -1)
    if packed:
        positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(DOCUMENTS)])[None]
    labels = tokens.roll(-1, 1)
    labels[:, 3:19] = IGNORED
    labels[:, -1] = IGNORED
    if packed == "padded":
        labels[:, [5, 6, 7, 45, 46, 47]] = IGNORED
    return {"tokens": tokens, "position_ids": positions, "labels": labels}


def own_share(batch: dict[str, Tensor], order: str, packed: str | None, rank: int, world: int) -> dict[str, Tensor]:
    """Cut as Megatron cuts; its cut of packed documents, which is Transformer Engine's, is written out here."""
    if order != "zigzag":
        cut = orders.build(order, LENGTH, world, 4)
        return {key: cut.shard(x, rank) for key, x in batch.items()}
    if not packed:
        shared: dict[str, Tensor] = get_batch_on_this_cp_rank(dict(batch))
        return shared
    slots = []
    for begin, end in pairwise(DOCUMENTS):
        chunks = torch.arange(begin, end).chunk(2 * world)
        slots += [chunks[rank], chunks[2 * world - 1 - rank]]
    return {key: x[:, torch.cat(slots)] for key, x in batch.items()}


def packed_parameters(packed: str | None) -> PackedSeqParams | None:
    if packed is None:
        return None
    documents, unpadded = (torch.tensor(bounds, dtype=torch.int32) for bounds in (DOCUMENTS, UNPADDED))
    if packed == "documents":
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=documents, cu_seqlens_kv=documents)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=unpadded,
        cu_seqlens_kv=unpadded,
        cu_seqlens_q_padded=documents,
        cu_seqlens_kv_padded=documents,
    )


def loss_sum(model: GPTModel, batch: dict[str, Tensor], packed: PackedSeqParams | None, dtype: torch.dtype) -> Tensor:
    """In fp32 by Megatron's own cross-entropy over tensor ranks, which knows no fp64; there, from the logits."""
    inputs = (batch["tokens"], batch["position_ids"], None)
    valid = batch["labels"] != IGNORED
    labels = batch["labels"].clamp(min=0)
    if dtype == torch.float32:
        losses = model(*inputs, labels=labels, packed_seq_params=packed)
    else:
        logits = all_logits(model(*inputs, packed_seq_params=packed))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return torch.where(valid, losses, 0.0).sum() / valid.numel()


def all_logits(own: Tensor) -> Tensor:
    """Of all tensor ranks; each differentiates its own, for Megatron's gathering needs a GPU."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.detach(), group=group)
    parts[group.rank()] = own
    return torch.cat(parts, -1)


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    world, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return whole.chunk(world, parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def reference(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process; the mesh must be one of single ranks."""
    config = make_config(1, 1, num_query_groups=case["groups"], **case.get("config", {}))
    documents = {None: [0, LENGTH], "documents": DOCUMENTS, "padded": WITH_PADDING}[case["packed"]]
    dense = type("Dense", (DenseAttention,), {"documents": documents})
    model = make_model(config, case["position"], dense, dtype)
    loss = loss_sum(model, make_batch(case["packed"]), None, dtype)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def differences(
    rank: int, world: int, context: int, tensor: int, cases: list[dict[str, Any]], dtype: torch.dtype
) -> list[float]:
    """For each case the largest difference in loss and gradients, each relative to its largest value."""
    alone = Mesh.create(Degrees(world, 1, 1), torch.device("cpu"))
    expected = [reference(case, dtype) for case in cases]
    alone.destroy()
    mesh = Mesh.create(Degrees(1, context, tensor), torch.device("cpu"))
    results = []
    for case, (whole_loss, gradients) in zip(cases, expected):
        config = make_config(context, tensor, num_query_groups=case["groups"], **case.get("config", {}))
        spec = core_attention_spec(case["plan"], case["order"], stripe=4)
        model = make_model(config, case["position"], spec, dtype)
        batch = own_share(make_batch(case["packed"]), case["order"], case["packed"], mesh.context_rank, context)
        loss = loss_sum(model, batch, packed_parameters(case["packed"]), dtype) / context
        loss.backward()
        assert spec.params["plans"]._prepared.cache_info().misses == (2 if "config" in case else 1)
        dist.all_reduce(loss.detach(), group=mesh.context)
        worst = float((loss.detach() - whole_loss).abs() / whole_loss)
        assert {name for name, _ in model.named_parameters()} == set(gradients)
        for name, parameter in model.named_parameters():
            dist.all_reduce(parameter.grad, group=mesh.context)
            difference = (parameter.grad - own_part(gradients[name], parameter)).abs().max()
            worst = max(worst, float(difference / gradients[name].abs().max()))
        results.append(worst)
    mesh.destroy()
    return results


CASES = [
    CASE,
    CASE | {"position": "learned_absolute", "groups": 4, "plan": "all_gather"},
    CASE | {"position": "learned_absolute", "packed": "documents"},
    CASE | {"packed": "padded"},
    CASE | {"packed": "documents", "plan": "all_gather", "order": "contiguous"},
    CASE | {"order": "striped", "position": "learned_absolute"},
    CASE | {"config": {"window_size": (6, 0), "window_attn_skip_freq": 2, "softmax_scale": 0.2}},
]


@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (4, 1), (2, 2)])
def test_gradients_equal_those_of_one_process(pool: Pool, context: int, tensor: int) -> None:
    """In fp64, from the logits; position embeddings none and learned, grouped queries, documents, windows."""
    worst = max(max(found) for found in pool.run(context * tensor, differences, context, tensor, CASES, torch.float64))
    print(f"largest relative difference {worst:.1e}")
    assert worst < 1e-10


def test_megatrons_own_loss_equals_that_of_one_process(pool: Pool) -> None:
    """In fp32, where logits are divided among tensor ranks as well."""
    cases = [CASE, CASE | {"position": "learned_absolute", "groups": 4, "packed": "documents"}]
    worst = max(max(found) for found in pool.run(4, differences, 2, 2, cases, torch.float32))
    print(f"largest relative difference {worst:.1e}")
    assert worst < 1e-5


def refusals(rank: int, world: int) -> list[str]:
    """What building a model says to each option in turn, then what running one says."""
    mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
    messages = []

    def attempt(call: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match="Farspan") as caught:
            call(*args, **options)
        messages.append(str(caught.value))

    def build(spec: ModuleSpec | None = None, **changes: Any) -> GPTModel:
        return make_model(make_config(1, 1, **changes), "none", spec or core_attention_spec(), torch.float32)

    for changes in ({"attention_dropout": 0.1}, {"qk_clip": True}, {"window_size": (4, 2)}):
        attempt(build, **changes)
    core = build().decoder.layers[0].self_attention.core_attention
    assert isinstance(core, CoreAttention)
    qkv = torch.randn(3, 8, 1, 4, 8)
    cu_seqlens = torch.tensor([0, 8])
    attempt(core, *qkv, torch.ones(1, 1, 8, 8))
    attempt(core, *qkv, None, attention_bias=torch.ones(1))
    attempt(core, *qkv, None, attn_mask_type=AttnMaskType.no_mask)
    attempt(core, qkv[0, :1], *qkv[1:], None)
    attempt(core, *qkv, None, packed_seq_params=PackedSeqParams(qkv_format="thd", local_cp_size=2))
    other = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=torch.tensor([0, 4, 8]))
    attempt(core, *qkv, None, packed_seq_params=other)
    mesh.destroy()
    return messages


def test_what_is_not_computed_is_refused(pool: Pool) -> None:
    named = [
        "attention_dropout 0.1: set it to 0",
        "qk_clip True",
        r"window_size (4, 2): its second number must be 0",
        "an attention_mask: pass None",
        "an attention_bias",
        "attn_mask_type",
        "keys of earlier calls",
        "hybrid_context_parallel",
        "cu_seqlens_q and cu_seqlens_kv that differ",
    ]
    messages = pool.run(1, refusals)[0]
    assert len(messages) == len(named)
    assert all(name in message and "\n" not in message for name, message in zip(named, messages))


def test_a_specification_names_what_exists() -> None:
    with pytest.raises(ValueError, match="order is 'zigzags'; possible are contiguous, zigzag, striped"):
        core_attention_spec(order="zigzags")
    with pytest.raises(ValueError, match="plan is 'rings'; possible are"):
        core_attention_spec(plan="rings")
