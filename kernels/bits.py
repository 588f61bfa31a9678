"""Sets of small numbers as bits of int32 words, 32 a word."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

WORD = 32


def packed(chosen: Tensor) -> Tensor:
    """int32 `[..., words]` of bool `[..., numbers]`."""
    bits = functional.pad(chosen, (0, -chosen.shape[-1] % WORD)).unflatten(-1, (-1, WORD)).int()
    return (bits << torch.arange(WORD, device=bits.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def members(words: Tensor, numbers: Tensor) -> Tensor:
    """Bool `[..., n]`: which of `numbers` int64 `[n]` are in the sets `[..., words]`."""
    found = words[..., numbers // WORD]  # a copy, large where there are many sets
    found >>= (numbers % WORD).int()
    found &= 1
    return found.bool()


def union(words: Tensor) -> Tensor:
    """Of the sets along the last dim, word by word."""
    while words.shape[-1] > 1:
        words = functional.pad(words, (0, words.shape[-1] % 2))
        words = words[..., 0::2] | words[..., 1::2]
    return words[..., 0]


def counts(words: Tensor) -> Tensor:
    """int64 `[...]`: how many numbers are in the sets `[..., words]`."""
    x = words - ((words >> 1) & 0x55555555)  # the masks clear the signs that a shift brings in
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).sum(-1)
