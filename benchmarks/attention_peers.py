"""Who computes attention in `attention.py`: our backends and the libraries that stand beside them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from attention_cases import Case
from torch import Tensor

from farspan.kernels import IntervalMask, attend, attend_backward

Gradients = tuple[Tensor, Tensor, Tensor]


class CannotError(Exception):
    """The peer has no way to say this mask."""


class NotInstalledError(Exception):
    """The peer's package is not there."""


class Peer:
    """Attention of one case. `backward` belongs to the last `forward`; results are `[1, S, heads, D]`."""

    block_mask_ms: float | None = None

    def __init__(self, case: Case) -> None:
        self.case = case

    def forward(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> Gradients:
        raise NotImplementedError


class Farspan(Peer):
    """`attend` and `attend_backward` with one backend. delta is computed in the backward pass, as libraries do."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__(case)
        self.backend = backend

    def forward(self) -> Tensor:
        case = self.case
        self.out, self.lse = attend(case.q, case.k, case.v, case.mask, backend=self.backend)
        return self.out

    def backward(self) -> Gradients:
        case = self.case
        return attend_backward(case.dout, case.q, case.k, case.v, self.out, self.lse, case.mask, backend=self.backend)


class Cudnn(Peer):
    """cuDNN through torch's operator, which takes `[B, heads, S, D]`: views, nothing is copied."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if case.mask_name not in ("causal", "full"):
            raise CannotError
        self.causal = case.mask_name == "causal"
        self.inputs = tuple(x.transpose(1, 2) for x in (case.q, case.k, case.v))

    def forward(self) -> Tensor:
        self.saved = torch.ops.aten._scaled_dot_product_cudnn_attention(*self.inputs, None, True, 0.0, self.causal)
        return self.saved[0].transpose(1, 2)

    def backward(self) -> Gradients:
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = self.saved
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            self.case.dout.transpose(1, 2), *self.inputs, out, lse, seed, offset, None, cu_q, cu_k, max_q, max_k,
            0.0, self.causal,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Flash(Peer):
    """FlashAttention-2 as torch ships it."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if case.mask_name not in ("causal", "full", "window"):
            raise CannotError
        self.causal = case.mask_name != "full"
        self.window = {} if case.window is None else {"window_size_left": case.window - 1, "window_size_right": 0}

    def forward(self) -> Tensor:
        case, length = self.case, self.case.q.shape[1]
        self.saved = torch.ops.aten._flash_attention_forward(
            case.q, case.k, case.v, None, None, length, length, 0.0, self.causal, False, **self.window
        )
        return self.saved[0]

    def backward(self) -> Gradients:
        case, length = self.case, self.case.q.shape[1]
        out, lse, state, unused, _ = self.saved
        return torch.ops.aten._flash_attention_backward(
            case.dout, case.q, case.k, case.v, out, lse, None, None, length, length, 0.0, self.causal, state, unused,
            **self.window,
        )  # fmt: skip


class Differentiable(Peer):
    """A peer whose backward pass is reached through autograd only."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.inputs = tuple(x.detach().requires_grad_() for x in (case.q, case.k, case.v))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        self.out = self.attention(*self.inputs)
        return self.out.detach()

    def backward(self) -> Gradients:
        return torch.autograd.grad(self.out, self.inputs, self.case.dout, retain_graph=True)


class Flex(Differentiable):
    """FlexAttention, compiled; its block mask is made from our mask, outside what is timed."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # each case compiles anew, or dynamo would count recompilations and give up
        self.compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        self.block_mask = None
        if case.mask_name != "full":
            begin = time.perf_counter()
            self.block_mask = block_mask(case.mask, case.mask_function)
            if case.q.is_cuda:
                torch.cuda.synchronize()
            self.block_mask_ms = (time.perf_counter() - begin) * 1e3

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.compiled(q, k, v, block_mask=self.block_mask, enable_gqa=True).transpose(1, 2)


class FlashAttention4(Differentiable):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if case.mask_name not in ("causal", "full", "window"):
            raise CannotError
        try:
            from flash_attn.cute import flash_attn_func
        except ModuleNotFoundError as error:
            raise NotInstalledError from error
        self.function = flash_attn_func
        self.window = (None, None) if case.window is None else (case.window - 1, 0)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v, causal=self.case.mask_name == "causal", window_size=self.window)[0]


LIBRARIES: dict[str, Callable[[Case], Peer]] = {
    "cudnn": Cudnn,
    "flash": Flash,
    "flex": Flex,
    "flash_attn_4": FlashAttention4,
}


def build(name: str, case: Case) -> Peer:
    """A library, or `farspan:BACKEND`."""
    owner, _, backend = name.partition(":")
    if owner == "farspan" and backend:
        return Farspan(case, backend)
    if name not in LIBRARIES:
        raise SystemExit(f"there is no peer {name!r}; possible are farspan:BACKEND, {', '.join(LIBRARIES)}")
    return LIBRARIES[name](case)


def block_mask(mask: IntervalMask, mask_function: Callable[..., Tensor], tile: int = 128):
    """FlexAttention's BlockMask of an interval mask, `[1, 1, row tiles, key tiles]`, exact in bounded memory."""
    from torch.nn.attention.flex_attention import BlockMask

    length = mask.rows
    seen = torch.stack([_visible_keys(mask, start, tile) for start in range(0, length, tile)])  # [row tiles, key tiles]
    sizes = torch.full((-(-length // tile),), tile, device=mask.device)
    sizes[-1] = length - tile * (len(sizes) - 1)
    whole = seen == sizes[:, None] * sizes
    partial = (seen > 0) & ~whole

    def lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
        """How many tiles each row tile has, and which, the rest behind them."""
        order = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
        return tiles.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *lists(partial), *lists(whole), BLOCK_SIZE=tile, mask_mod=mask_function, seq_lengths=(length, length)
    )


def _visible_keys(mask: IntervalMask, start: int, tile: int) -> Tensor:
    """Number of visible pairs of one row tile with each key tile, int64."""
    visible = mask.visible(slice(start, min(start + tile, mask.rows)), slice(0, mask.rows))[0].sum(0)
    return torch.nn.functional.pad(visible, (0, -mask.rows % tile)).unflatten(0, (-1, tile)).sum(1)
