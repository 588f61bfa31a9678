"""The dense fp64 oracle and brute-force masks: written from the definitions, sharing nothing with the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from farspan.kernels import IntervalMask, masks


def dense_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv in fp64 by autograd over full matrices.

    `allowed` is boolean `[B or 1, S, N]`, or by head `[B or 1, H, S, N]`.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) / math.sqrt(q.shape[3])
    allowed = allowed if allowed.dim() == 4 else allowed[:, None]
    sees = allowed.any(-1, keepdim=True)
    scores = torch.where(allowed, scores, torch.where(sees, -torch.inf, 0.0))
    weights = torch.softmax(scores, -1) * sees
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    gradients = torch.autograd.grad(out, (q, k, v), dout.double())
    lse = torch.where(sees[..., 0], torch.logsumexp(scores, -1), -torch.inf).expand(q.shape[0], q.shape[2], q.shape[1])
    return out.detach(), lse.detach(), *gradients


def difference(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference; two equal infinities differ by 0, anything else that is not finite by inf."""
    gap = torch.where(x == y, 0.0, (x.detach().double() - y.detach().double()).abs())
    return float(torch.nan_to_num(gap, nan=math.inf).max()) if gap.numel() else 0.0


@dataclass(frozen=True)
class MaskCase:
    """A mask from its builder, and the same mask from its definition, element by element."""

    name: str
    mask: IntervalMask
    allowed: Tensor


def _brute(length: int, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of every pair by itself: `sees` is given q as `[length, 1]` and k as `[1, length]`."""
    positions = torch.arange(length)
    return sees(positions[:, None], positions[None]).expand(length, length)[None].contiguous()


@cache
def mask_cases(length: int) -> list[MaskCase]:
    """One case a builder, with odd documents: one of a single token, lengths that nothing divides."""
    cu = sorted({0, 1, min(6, length - 1), length // 2, length})
    sizes = [b - a for a, b in pairwise(cu)]
    document = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    start = torch.tensor(cu)[document]
    prefixes = [min(size, 2 + 3 * i) for i, size in enumerate(sizes)]
    contexts = [max(0, size - 1 - i) for i, size in enumerate(sizes)]
    prefix_of, context_of = torch.tensor(prefixes)[document], torch.tensor(contexts)[document]
    parts = [_parts(size) for size in sizes]
    answer = torch.tensor([number for of in parts for number, size in enumerate(of) for _ in range(size)])

    def together(q: Tensor, k: Tensor) -> Tensor:
        return document[q] == document[k]

    def star(q: Tensor, k: Tensor) -> Tensor:
        context, row, key = context_of[q], q - start[q], k - start[k]
        local = (row >= context) | (row // 4 == key // 4)
        return together(q, k) & (k <= q) & (local | (key < context.clamp(max=3)))

    def window(q: Tensor, k: Tensor) -> Tensor:
        return together(q, k) & (k <= q) & ((q - k < 5) | (k - start[k] < 2))

    def prefix(q: Tensor, k: Tensor) -> Tensor:
        return together(q, k) & ((k <= q) | (k - start[k] < prefix_of[k]))

    def question(q: Tensor, k: Tensor) -> Tensor:
        return together(q, k) & (k <= q) & ((answer[k] == 0) | (answer[k] == answer[q]))

    return [
        MaskCase("causal", masks.causal(length), _brute(length, lambda q, k: k <= q)),
        MaskCase("full", masks.full(length), _brute(length, lambda q, k: q >= 0)),
        MaskCase("documents", masks.causal(length, cu), _brute(length, lambda q, k: (k <= q) & together(q, k))),
        MaskCase("window", masks.sliding_window(length, 5, 2, cu), _brute(length, window)),
        MaskCase("star", masks.star(length, 4, 3, contexts, cu), _brute(length, star)),
        MaskCase("prefix", masks.prefix_lm(length, prefixes, cu), _brute(length, prefix)),
        MaskCase("question", masks.shared_question(length, parts), _brute(length, question)),
        MaskCase("blind", *_blind(length)),
    ]


def _parts(size: int) -> Sequence[int]:
    return [size] if size < 4 else [size - 3, 1, 2]


def _blind(length: int) -> tuple[IntervalMask, Tensor]:
    """Causal, but every third row sees nothing."""
    sees = torch.arange(length) % 3 != 1
    mask = IntervalMask(*(bound * sees for bound in masks.causal(length).bounds))
    return mask, _brute(length, lambda q, k: (k <= q) & (q % 3 != 1))


def random_qkv(
    length: int, heads: tuple[int, int], dim: int, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, dout = (torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
    return q, k, v, dout
