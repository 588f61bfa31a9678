"""Interval masks: the one form in which every static attention mask is written, cut and computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.transfer import to_device

Kind = Literal["empty", "full", "causal", "general"]
Positions = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Row q sees key x iff `begin[q] <= x < end[q]` or `anchor_begin[q] <= x < anchor_end[q]`.

    The four bounds are int32 `[B or 1, S]`. Overlapping or touching intervals are fused when the mask is made, so the
    number of visible keys is the sum of the lengths; a row without a second interval has `anchor_begin == anchor_end`.
    In `parallel/` keys and rows are positions of the packed row; a kernel gets `at(...)`, where keys are slots.
    """

    begin: Tensor
    end: Tensor
    anchor_begin: Tensor
    anchor_end: Tensor
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What kernels worked out from this mask, by name: all layers of a batch share a mask, so that is done once."""

    def __post_init__(self) -> None:
        begin, end, anchor_begin, anchor_end = (bound.to(torch.int32) for bound in self.bounds)
        if len({bound.shape for bound in (begin, end, anchor_begin, anchor_end)}) != 1 or begin.dim() != 2:
            raise ValueError(
                f"the four bounds of a mask are [batch, rows] alike, got {[tuple(b.shape) for b in self.bounds]}"
            )
        end, anchor_end = torch.maximum(begin, end), torch.maximum(anchor_begin, anchor_end)
        no_anchor, no_main = anchor_end == anchor_begin, end == begin
        # An empty interval takes the place of the other one, so that the fusing below treats them alike.
        anchor_begin, anchor_end = (
            torch.where(no_anchor, begin, anchor_begin),
            torch.where(no_anchor, begin, anchor_end),
        )
        begin, end = torch.where(no_main, anchor_begin, begin), torch.where(no_main, anchor_end, end)
        touching = (anchor_begin <= end) & (begin <= anchor_end)
        begin = torch.where(touching, torch.minimum(begin, anchor_begin), begin)
        end = torch.where(touching, torch.maximum(end, anchor_end), end)
        anchor_begin, anchor_end = torch.where(touching, begin, anchor_begin), torch.where(touching, begin, anchor_end)
        for name, bound in zip(("begin", "end", "anchor_begin", "anchor_end"), (begin, end, anchor_begin, anchor_end)):
            object.__setattr__(self, name, bound.contiguous())

    @property
    def bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.begin, self.end, self.anchor_begin, self.anchor_end

    @property
    def batch(self) -> int:
        return self.begin.shape[0]

    @property
    def rows(self) -> int:
        return self.begin.shape[1]

    @property
    def device(self) -> torch.device:
        return self.begin.device

    def to(self, device: torch.device | str) -> IntervalMask:
        return IntervalMask(*(to_device(bound, device) for bound in self.bounds))

    def area(self) -> int:
        """Number of visible (row, key) pairs, summed over the batch."""
        return int(
            (self.end - self.begin).sum(dtype=torch.int64)
            + (self.anchor_end - self.anchor_begin).sum(dtype=torch.int64)
        )

    def at(self, q_positions: Positions, k_positions: Positions) -> IntervalMask:
        """The mask of one rectangle, its keys counted in slots: one binary search per bound, or for a run of keys none.

        `q_positions` `[rows]` in any order; those at or past `self.rows` are padding and see nothing. `k_positions`
        `[keys]` must ascend (ValueError), which every order and every piece keeps.
        """
        return IntervalMask(*self._key_slots(self._bounds_of(q_positions), k_positions))

    def _bounds_of(self, positions: Positions) -> list[Tensor]:
        run = _run(positions)
        if run is not None and run[1] <= self.rows:
            return [bound[:, slice(*run)] for bound in self.bounds]
        q = torch.as_tensor(positions, device=self.device)
        outside, rows = q >= self.rows, q.clamp(max=self.rows - 1)
        return [torch.where(outside, bound.new_zeros(()), bound[:, rows]) for bound in self.bounds]

    def _key_slots(self, bounds: list[Tensor], positions: Positions) -> list[Tensor]:
        run = _run(positions)
        if run is not None:
            first, stop = run
            return [bound.clamp(first, stop) - first for bound in bounds]
        k = torch.as_tensor(positions, device=self.device).contiguous().to(torch.int32)
        if k.numel() > 1 and not bool((k[1:] > k[:-1]).all()):
            raise ValueError("key positions of a piece must ascend")
        return [torch.searchsorted(k, bound.contiguous(), out_int32=True) for bound in bounds]

    def kind(self, n_keys: int) -> Kind:
        """What a library kernel would call this mask over `n_keys` keys.

        "causal" aligns bottom-right: row i of n sees keys `[0, i + 1 + n_keys - n)`.
        """
        single = bool((self.anchor_end == self.anchor_begin).all())
        if single and bool((self.end == self.begin).all()):
            return "empty"
        if not single or bool((self.begin != 0).any()):
            return "general"
        if bool((self.end == n_keys).all()):
            return "full"
        diagonal = torch.arange(1, self.rows + 1, device=self.device) + (n_keys - self.rows)
        return "causal" if bool((self.end == diagonal).all()) else "general"

    def __and__(self, other: IntervalMask) -> IntervalMask:
        """Intersection of two masks of which one at least has a single interval in every row."""
        two, one = (other, self) if bool((other.anchor_end > other.anchor_begin).any()) else (self, other)
        if bool((one.anchor_end > one.anchor_begin).any()):
            raise ValueError(
                "two masks with two intervals each may need four; build the mask with its documents instead"
            )
        return IntervalMask(
            torch.maximum(two.begin, one.begin),
            torch.minimum(two.end, one.end),
            torch.maximum(two.anchor_begin, one.begin),
            torch.minimum(two.anchor_end, one.end),
        )

    def visible(self, rows: slice, keys: slice) -> Tensor:
        """Boolean `[B or 1, rows, keys]` of one tile, for kernels that test elements."""
        x = torch.arange(keys.start, keys.stop, device=self.device, dtype=torch.int32)
        begin, end, anchor_begin, anchor_end = (bound[:, rows, None] for bound in self.bounds)
        return ((x >= begin) & (x < end)) | ((x >= anchor_begin) & (x < anchor_end))


def _run(positions: Positions) -> tuple[int, int] | None:
    """Consecutive positions as (first, behind the last); None for others, and for those on a GPU, which would wait."""
    if isinstance(positions, Tensor) and positions.device.type != "cpu":
        return None
    array = np.asarray(positions)
    if not len(array) or array[-1] - array[0] != len(array) - 1 or (np.diff(array) != 1).any():
        return None
    return int(array[0]), int(array[-1]) + 1


def stack(masks: Iterable[IntervalMask]) -> IntervalMask:
    """One mask for a batch: `[1, S]` masks of equal length become `[B, S]`."""
    bounds = zip(*(mask.bounds for mask in masks), strict=True)
    return IntervalMask(*(torch.cat(bound) for bound in bounds))


# The builders. Each takes the documents themselves, as cumulative lengths `[documents + 1]` from 0 to `length`:
# intersecting with documents afterwards would lose the sinks, anchors and prefixes of all but the first.


def full(length: int, cu_seqlens: Sequence[int] | None = None) -> IntervalMask:
    """Every row sees its whole document."""
    documents = _Documents(length, cu_seqlens)
    return _single(documents.begin, documents.end)


def causal(length: int, cu_seqlens: Sequence[int] | None = None) -> IntervalMask:
    """Every row sees its document up to itself."""
    documents = _Documents(length, cu_seqlens)
    return _single(documents.begin, documents.row + 1)


def sliding_window(length: int, width: int, sinks: int = 0, cu_seqlens: Sequence[int] | None = None) -> IntervalMask:
    """Every row sees the last `width` tokens, itself included, and the first `sinks` tokens of its document."""
    if width < 1 or sinks < 0:
        raise ValueError(f"a sliding window needs width >= 1 and sinks >= 0, got width {width} and sinks {sinks}")
    documents = _Documents(length, cu_seqlens)
    begin, row = documents.begin, documents.row
    return IntervalMask(torch.maximum(begin, row - width + 1), row + 1, begin, torch.minimum(begin + sinks, row + 1))


def prefix_lm(length: int, prefixes: Sequence[int], cu_seqlens: Sequence[int] | None = None) -> IntervalMask:
    """The first `prefixes[document]` tokens see each other both ways, the rest is causal (T5, arXiv:1910.10683)."""
    documents = _Documents(length, cu_seqlens)
    prefix = torch.minimum(documents.begin + documents.per_document(prefixes, "prefixes"), documents.end)
    return _single(documents.begin, torch.maximum(prefix, documents.row + 1))


def star(
    length: int, block: int, anchor: int, contexts: Sequence[int], cu_seqlens: Sequence[int] | None = None
) -> IntervalMask:
    """Star Attention (arXiv:2411.17116): the context is causal in blocks that also see the anchor; the rest sees all.

    The first `contexts[document]` tokens of a document are its context, cut into blocks of `block` tokens; the anchor
    is the context's first `anchor` tokens.
    """
    if block < 1 or anchor < 0:
        raise ValueError(f"star needs block >= 1 and anchor >= 0, got block {block} and anchor {anchor}")
    documents = _Documents(length, cu_seqlens)
    begin, row = documents.begin, documents.row
    context = documents.per_document(contexts, "contexts")
    offset = row - begin
    local = torch.where(offset >= context, begin, begin + offset // block * block)
    anchor_end = torch.minimum(begin + torch.minimum(context, torch.full_like(context, anchor)), row + 1)
    return IntervalMask(local, row + 1, begin, anchor_end)


def shared_question(length: int, parts: Sequence[Sequence[int]]) -> IntervalMask:
    """Documents of one question and several answers: an answer sees the question and itself, not other answers.

    `parts[document]` is `[question, answer, answer, ...]` in tokens; they must add up to `length`.
    """
    if sum(map(sum, parts)) != length:
        raise ValueError(f"the parts of shared_question add up to {sum(map(sum, parts))} tokens, not to {length}")
    begin, question, width = [], [], []
    at = 0
    for sizes in parts:
        document = at
        for size in sizes:
            begin.append(torch.full((size,), at))
            question.append(torch.full((size,), document))
            width.append(torch.full((size,), sizes[0]))
            at += size
    row = torch.arange(length)[None]
    begins, questions, widths = torch.cat(begin)[None], torch.cat(question)[None], torch.cat(width)[None]
    return IntervalMask(begins, row + 1, questions, torch.minimum(questions + widths, row + 1))


def _single(begin: Tensor, end: Tensor) -> IntervalMask:
    return IntervalMask(begin, end, begin, begin)


class _Documents:
    """For each row `[1, length]`: its own index and where its document begins and ends."""

    def __init__(self, length: int, cu_seqlens: Sequence[int] | None) -> None:
        bounds = torch.as_tensor([0, length] if cu_seqlens is None else cu_seqlens, dtype=torch.int64).cpu()
        sizes = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != length or bool((sizes < 0).any()):
            raise ValueError(
                f"cu_seqlens must ascend from 0 to {length}, got {bounds.tolist()[:8]} ... {int(bounds[-1])}"
            )
        self.count = len(sizes)
        self.row = torch.arange(length)[None]
        self.begin = torch.repeat_interleave(bounds[:-1], sizes)[None]
        self.end = torch.repeat_interleave(bounds[1:], sizes)[None]
        self.index = torch.repeat_interleave(torch.arange(self.count), sizes)[None]

    def per_document(self, values: Sequence[int], name: str) -> Tensor:
        if len(values) != self.count:
            raise ValueError(f"{name} has {len(values)} entries for {self.count} documents")
        return torch.as_tensor(values)[self.index]
