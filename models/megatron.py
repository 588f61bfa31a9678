"""Farspan's attention inside Megatron Core's own GPTModel."""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from farspan.parallel.orders import ORDERS
from farspan.parallel.plan_cache import Layout, PlanCache

# `padding_causal` is the name of `causal` where documents are packed.
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def core_attention_spec(
    plan: str = "ring", order: str = "zigzag", stripe: int = 128, backend: str = "deterministic"
) -> ModuleSpec:
    """What takes the place of `core_attention` in a layer's specification, so that a plan shares each sequence:

        layer = get_gpt_layer_local_spec()
        layer.submodules.self_attention.submodules.core_attention = core_attention_spec(plan="ring")
        model = GPTModel(config, layer, vocab_size, max_sequence_length)

    The ranks of Megatron's context group (`config.context_parallel_size`) hold a sequence in `order`. Farspan's zigzag
    is the cut that Megatron makes itself (`get_batch_on_this_cp_rank`, and each document by itself in packed batches)
    and that its rotary embeddings take for granted; another order is for models without them, whose batches you cut
    with `farspan.parallel.orders`. `cp_comm_type` has no meaning here: who sends what is the plan's to say.

    The layers that are built from one specification share their prepared plans. ValueError, naming the option, if a
    model asks for what Farspan does not compute.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; possible are {', '.join(ORDERS)}")
    return ModuleSpec(
        module=CoreAttention, params={"plans": PlanCache(plan, backend), "order": order, "stripe": stripe}
    )


class CoreAttention(nn.Module):
    """Causal self-attention of the sequences that the context ranks share; windows and packed documents included."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        plans: PlanCache,
        order: str,
        stripe: int,
    ) -> None:
        super().__init__()
        _check(config, attn_mask_type, attention_type, attention_dropout)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.group = pg_collection.cp
        self.plans, self.order, self.stripe, self.scale = plans, order, stripe, softmax_scale
        self.window = _window(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """`[slots, batch, heads, head dim]`, or `[slots, heads, head dim]` if packed, to `[slots, batch, hidden]`."""
        _refuse(attention_mask is not None, "an attention_mask: pass None, and documents through packed_seq_params")
        _refuse(attention_bias is not None, "an attention_bias")
        _refuse(attn_mask_type not in (None, *_CAUSAL), f"attn_mask_type {attn_mask_type}, only causal")
        _refuse(len(query) != len(key), "keys of earlier calls (inference_context)")
        if query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        layout = Layout(
            self.order,
            len(query) * self.group.size(),
            self.group.size(),
            self.stripe,
            self._documents(packed_seq_params),
            by_document=True,
        )
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = self.plans.attention(q, k, v, layout, self.group, window=self.window, scale=self.scale)
        return out.transpose(0, 1).flatten(2)

    def _documents(self, packed: PackedSeqParams | None) -> tuple[int, ...] | None:
        """The padded documents: what pads them comes last, where no token of a causal document sees it."""
        if packed is None or packed.qkv_format is None:
            return None
        _refuse(packed.qkv_format not in ("sbhd", "thd"), f"qkv_format {packed.qkv_format!r}, only 'sbhd' and 'thd'")
        _refuse(
            packed.cp_group is not None or packed.local_cp_size is not None,
            "hybrid_context_parallel, a context group of its own for each batch",
        )
        if packed.qkv_format == "sbhd":
            return None
        rows, keys = (
            self.plans.documents(plain if padded is None else padded)
            for plain, padded in (
                (packed.cu_seqlens_q, packed.cu_seqlens_q_padded),
                (packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded),
            )
        )
        _refuse(rows != keys, "cu_seqlens_q and cu_seqlens_kv that differ")
        return rows


def _check(config: TransformerConfig, mask: AttnMaskType, attention_type: str, dropout: float | None) -> None:
    dropout = config.attention_dropout if dropout is None else dropout
    _refuse(dropout != 0, f"attention_dropout {dropout}: set it to 0")
    _refuse(mask not in _CAUSAL, f"attn_mask_type {mask}, only causal")
    _refuse(attention_type != "self", f"{attention_type!r} attention, only self-attention")
    _refuse(config.softmax_type != "vanilla", f"softmax_type {config.softmax_type!r}, only 'vanilla'")
    _refuse(config.cuda_graph_impl != "none", f"cuda_graph_impl {config.cuda_graph_impl!r}, only 'none'")
    for option in (
        "multi_latent_attention",
        "apply_query_key_layer_scaling",
        "qk_clip",
        "log_max_attention_logit",
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
        "hybrid_context_parallel",
        "hierarchical_context_parallel_sizes",
        "batch_invariant_mode",
    ):
        value: Any = getattr(config, option)
        _refuse(bool(value), f"{option} {value}")


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    """How many tokens a row of this layer sees, itself included. Megatron counts those to its left and right."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    left, right = config.window_size
    _refuse(right != 0, f"window_size {config.window_size}: its second number must be 0")
    return left + 1 if left >= 0 else None


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise ValueError(f"Farspan's core attention does not compute {what}")
