"""Farspan's attention inside Hugging Face models, through their attention interface; transformers is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.parallel.plan_cache import Layout, PlanCache

_IGNORED = -100  # the label that Hugging Face's losses leave out


class SharedBatch:
    """What attention must know of a batch; it reaches every layer as the keyword argument `farspan`.

    No dataclass, for some wrappers of models take those apart in search of tensors.
    """

    def __init__(self, plans: PlanCache, layout: Layout, group: dist.ProcessGroup | None) -> None:
        self.plans, self.layout, self.group = plans, layout, group


class BatchSharder:
    """Gives each rank of `group` its share of every batch, in the form that a causal language model takes:

        AttentionInterface.register("farspan", attention_function)
        AttentionMaskInterface.register("farspan", attention_mask)
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="farspan")
        sharder = BatchSharder(group, plan="ring", order="zigzag")

        loss = model(**sharder(input_ids, labels)).loss
        loss.backward()

    Each rank's loss is its part of a sum: add losses, and gradients, over the ranks. An engine that averages gradients
    instead (DDP, FSDP, DeepSpeed) needs `loss * number_of_ranks`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        plan: str = "ring",
        order: str = "zigzag",
        stripe: int = 128,
        backend: str = "deterministic",
    ) -> None:
        self.group, self.order, self.stripe = group, order, stripe
        self.plans = PlanCache(plan, backend)

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> dict[str, Any]:
        """The share of this rank; all ranks of the group give the same whole rows.

        Args:
            input_ids: `[B, S]`, of any length; what pads a rank's share is seen by no token and has no label.
            labels: `[B, S]`, -100 where there is nothing to predict. As everywhere in transformers they are the tokens
                themselves, not shifted: that is done here, before the rows are cut.
            position_ids: `[B or 1, S]`, for rotary embeddings; by default they count from 0, and anew in each document.
            cu_seqlens: cumulative lengths `[documents + 1]`, from 0 to S, of documents packed into one row (B = 1).
                They do not see each other, and the last token of one does not predict the first of the next.
            num_items_in_batch: by what the sum of this rank's losses is divided; by default the labels of these rows
                that are not -100. With several rows a step, over data parallel ranks or accumulated, give the count of
                the whole step.
        """
        length, rank = input_ids.shape[1], 0 if self.group is None else self.group.rank()
        world = 1 if self.group is None else self.group.size()
        documents = None if cu_seqlens is None else self.plans.documents(cu_seqlens)
        if documents is not None and len(input_ids) != 1:
            raise ValueError(f"cu_seqlens packs documents into one row, but input_ids has {len(input_ids)}")
        layout = Layout(self.order, length, world, self.stripe, documents)
        order = self.plans.order(layout)
        if position_ids is None:
            position_ids = _positions(length, documents).to(input_ids.device)
        batch: dict[str, Any] = {
            "input_ids": order.shard(input_ids, rank),
            "position_ids": order.shard(position_ids.expand(len(input_ids), -1), rank),
            "use_cache": False,
            "farspan": SharedBatch(self.plans, layout, self.group),
        }
        if labels is not None:
            shifted = _shifted(labels, documents)
            own = order.shard(shifted, rank, padding=_IGNORED)
            # Models compute a loss if there are `labels`; given `shift_labels` as well, they do not shift them again.
            batch |= {"labels": own, "shift_labels": own}
            batch["num_items_in_batch"] = (
                (shifted != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            )
        return batch


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    farspan: SharedBatch | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[B, H or Hkv, slots, D]` to `[B, slots, H, D]`, and no weights.

    ValueError, naming the option, for what Farspan does not compute.
    """
    if farspan is None:
        raise ValueError("attn_implementation 'farspan' needs what BatchSharder makes: model(**sharder(input_ids))")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(not causal, "attention that is not causal (is_causal=False)")
    _refuse(attention_mask is not None, "an attention_mask: leave it out, and give documents to BatchSharder")
    _refuse(dropout != 0, f"attention_dropout {dropout}: set it to 0")
    _refuse(key.shape[2] != query.shape[2], "keys of earlier calls (past_key_values)")
    _refuse(bool(others.get("output_attentions")), "output_attentions")
    _refuse(others.get("cu_seq_lens_q") is not None, "cu_seq_lens_q: give the documents to BatchSharder, as cu_seqlens")
    for option in ("softcap", "s_aux", "position_bias", "head_mask", "cache"):
        _refuse(others.get(option) is not None, option)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return farspan.plans.attention(q, k, v, farspan.layout, farspan.group, window=sliding_window, scale=scaling), None


def attention_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **others: Any,
) -> None:
    """What transformers calls to make a mask. Farspan makes its own, and refuses what would be lost with this one."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    _refuse(padded, "an attention_mask with zeros: pad on the right, with labels of -100, and leave it out")
    _refuse(use_vmap, "the mask function of this model (or_mask_function, and_mask_function)")
    chunked = local_size is not None and local_size != getattr(config, "sliding_window", None)
    _refuse(chunked, "chunked attention (attention_chunk_size)")


def _positions(length: int, documents: tuple[int, ...] | None) -> Tensor:
    parts = [torch.arange(end - begin) for begin, end in pairwise(documents or (0, length))]
    return torch.cat(parts)[None]


def _shifted(labels: Tensor, documents: tuple[int, ...] | None) -> Tensor:
    """What each token predicts: the label of the next one, and nothing at the end of a document."""
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    if documents is not None:
        ends = [end - 1 for begin, end in pairwise(documents) if end > begin]
        shifted[:, ends] = _IGNORED
    return shifted


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise ValueError(f"attn_implementation 'farspan' does not compute {what}")
