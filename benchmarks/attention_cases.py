"""What `attention.py` computes: masks, random inputs, and a sample of the right answer in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels import IntervalMask, masks

# FlexAttention's form of a mask: (batch, head, row, key) to visible or not.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

MASKS = ("causal", "full", "documents", "window", "star")
# Scores of the fp64 answer that are held at once: 1 GiB.
_SCORES = 1 << 27
_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Case:
    """One problem for all peers: q and dout `[1, S, H, D]`, k and v `[1, S, Hkv, D]`.

    `window` is the width of a sliding window (None for other masks). `mask_function` says the same as `mask`.
    """

    mask_name: str
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: IntervalMask
    mask_function: MaskFunction
    window: int | None

    @classmethod
    def random(
        cls, mask_name: str, length: int, heads: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> Case:
        """Normal inputs in bf16, the same on every run: zeros would draw less power and run faster."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(n_heads: int) -> Tensor:
            return torch.randn(1, length, n_heads, head_dim, dtype=torch.bfloat16, device=device, generator=generator)

        mask, mask_function, window = make_mask(mask_name, length, device)
        return cls(
            mask_name, draw(heads), draw(kv_heads), draw(kv_heads), draw(heads), mask.to(device), mask_function, window
        )

    @property
    def flops(self) -> float:
        """Of the forward pass, counted over visible pairs: two products of 2 D each, for every query head."""
        return 4.0 * self.q.shape[3] * self.q.shape[2] * self.mask.area()


def make_mask(name: str, length: int, device: torch.device) -> tuple[IntervalMask, MaskFunction, int | None]:
    if name == "causal":
        return masks.causal(length), lambda b, h, row, key: key <= row, None
    if name == "full":
        return masks.full(length), lambda b, h, row, key: key >= 0, None
    if name == "window":
        width = min(4096, length // 2)
        return (
            masks.sliding_window(length, width),
            lambda b, h, row, key: (key <= row) & (row - key < width),
            width,
        )
    if name == "documents":
        bounds = _documents(length)
        document = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff()).to(device)
        return (
            masks.causal(length, bounds),
            lambda b, h, row, key: (key <= row) & (document[row] == document[key]),
            None,
        )
    if name == "star":
        block = min(8192, length // 8)
        anchor, context = block // 8, length - length // 8
        return (
            masks.star(length, block, anchor, [context]),
            lambda b, h, row, key: (key <= row) & ((row >= context) | (key < anchor) | (row // block == key // block)),
            None,
        )
    raise SystemExit(f"there is no mask {name!r}; possible are {', '.join(MASKS)}")


def _documents(length: int) -> list[int]:
    """Bounds of documents with log-normal lengths: 256 and the whole row are two deviations from the median."""
    low, high = math.log(min(256, length)), math.log(length)
    generator = torch.Generator().manual_seed(1)
    bounds = [0]
    while bounds[-1] < length:
        drawn = math.exp((low + high) / 2 + (high - low) / 4 * float(torch.randn((), generator=generator)))
        bounds.append(min(length, bounds[-1] + max(min(256, length), round(drawn))))
    return bounds


@dataclass(frozen=True, eq=False)
class Answer:
    """fp64 results of one kv head, the last, and its query heads: out and dq of some rows, dk and dv of some keys.

    out and dq are `[rows, H / Hkv, D]`, dk and dv `[keys, D]`.
    """

    rows: Tensor
    keys: Tensor
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def errors(self, out: Tensor, gradients: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, float]:
        """Relative L2 errors of what a peer returned, `[1, S, heads, D]` each."""
        found = {"out": (self._of_rows(out), self.out)}
        if gradients is not None:
            dq, dk, dv = gradients
            found |= {
                "dq": (self._of_rows(dq), self.dq),
                "dk": (dk[0, self.keys, -1], self.dk),
                "dv": (dv[0, self.keys, -1], self.dv),
            }
        return {name: float((got.double() - right).norm() / right.norm()) for name, (got, right) in found.items()}

    def _of_rows(self, x: Tensor) -> Tensor:
        return x[0, self.rows, -self.out.shape[1] :]


def answer(case: Case) -> Answer:
    """Goes over all rows in blocks, since a key's gradient is a sum over all of them; memory stays bounded."""
    length, group = case.q.shape[1], case.q.shape[2] // case.k.shape[2]
    generator = torch.Generator().manual_seed(2)
    device = case.q.device
    rows, keys = (torch.randperm(length, generator=generator)[:_SAMPLES].sort().values.to(device) for _ in range(2))
    dk, dv = (torch.zeros(len(keys), case.q.shape[3], dtype=torch.float64, device=device) for _ in range(2))
    for block in torch.arange(length, device=device).split(max(1, _SCORES // (group * length))):
        part = _Rows(case, block)
        inside = (keys >= part.low) & (keys < part.high)
        weights, ds = part.weights[..., keys[inside] - part.low], part.ds(keys[inside])
        dv[inside] += torch.einsum("rhk,rhd->kd", weights, part.dout)
        dk[inside] += torch.einsum("rhk,rhd->kd", ds, part.q)
    sampled = _Rows(case, rows)
    every_key = torch.arange(sampled.low, sampled.high, device=device)
    dq = sampled.ds(every_key) @ case.k[0, sampled.low : sampled.high, -1].double()
    return Answer(rows, keys, sampled.out, dq, dk, dv)


class _Rows:
    """fp64 attention of some rows over the keys `[low, high)` that they may see, for the last kv head."""

    def __init__(self, case: Case, rows: Tensor) -> None:
        begin, end, anchor_begin, anchor_end = (bound[0, rows] for bound in case.mask.bounds)
        self.low = int(torch.minimum(begin, anchor_begin).min())
        self.high = int(torch.maximum(end, anchor_end).max())
        group, self.scale = case.q.shape[2] // case.k.shape[2], case.q.shape[3] ** -0.5
        self.q, self.dout = (x[0, rows, -group:].double() for x in (case.q, case.dout))
        self.v = case.v[0, :, -1]
        keys = case.k[0, self.low : self.high, -1].double()
        x = torch.arange(self.low, self.high, device=rows.device)
        visible = ((x >= begin[:, None]) & (x < end[:, None])) | (
            (x >= anchor_begin[:, None]) & (x < anchor_end[:, None])
        )
        scores = (self.q @ keys.T * self.scale).masked_fill_(~visible[:, None], float("-inf"))
        self.weights = torch.softmax(scores, -1)
        self.out = self.weights @ self.v[self.low : self.high].double()
        self.delta = (self.dout * self.out).sum(-1, keepdim=True)

    def ds(self, keys: Tensor) -> Tensor:
        """Gradients `[rows, heads, keys]` of the unscaled scores of some keys."""
        return self.weights[..., keys - self.low] * (self.dout @ self.v[keys].double().T - self.delta) * self.scale
