"""What a layer keeps from its forward pass, and how the backward pass gets the rest back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farspan.models.attention import AttentionContext
from farspan.models.config import RecomputeMode
from farspan.parallel.execute import LayerMemory


class DeviceMemory:
    """Keeps tensors where they are."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, ...]] = {}

    def put(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        self._kept[name] = tensors

    def take(self, name: str) -> tuple[Tensor, ...] | None:
        return self._kept.pop(name, None)


def on_device(last: bool) -> LayerMemory:
    return DeviceMemory()


class Recomputation:
    """Runs layers so that they keep little for the backward pass, which computes the rest again from it.

    `none` keeps all that autograd saves, `full` each layer's input only. `selective` keeps the input and attention's
    results: what comes before and after attention is computed again, attention (kernels and communication) never is.
    The gradients are the same in every bit. `keep` makes the memory of one call of a layer that is computed again, and
    is told which of these is the last.

    The last `keep_layers` layers keep everything. Of all layers they hold it for the shortest time, and it is gone
    before the backward pass computes any layer again, so that it never adds to what that takes; the first layers would
    hold theirs to the very end. The number may change between steps.
    """

    def __init__(
        self,
        mode: RecomputeMode = "none",
        keep: Callable[[bool], LayerMemory] = on_device,
        keep_layers: int = 0,
    ) -> None:
        self.mode, self.keep, self.keep_layers = mode, keep, keep_layers

    def __call__(self, layers: nn.ModuleList, x: Tensor, contexts: Sequence[AttentionContext]) -> Tensor:
        """The layers one after another, each with its context, `[tokens, hidden]` to `[tokens, hidden]`."""
        again = 0 if self.mode == "none" or not torch.is_grad_enabled() else len(layers) - self.keep_layers
        for number, (layer, context) in enumerate(zip(layers, contexts, strict=True), start=1):
            if number > again:
                x = layer(x, context)
                continue
            call = _LayerCall(layer, x, context, self.mode, self.keep(number == again))
            # Nothing in a layer draws random numbers, so there is no state of theirs to put back.
            x = checkpoint(call, use_reentrant=False, preserve_rng_state=False)
        return x


class _LayerCall:
    """One call of a layer: made with its input at first, made again with what was kept of it."""

    def __init__(
        self, layer: nn.Module, x: Tensor, context: AttentionContext, mode: RecomputeMode, kept: LayerMemory
    ) -> None:
        self.layer, self.kept = layer, kept
        self.context = replace(context, memory=kept) if mode == "selective" else context
        self.x: Tensor | None = x
        self.requires_grad = x.requires_grad

    def __call__(self) -> Tensor:
        out: Tensor = self.layer(self._input(), self.context)
        return out

    def _input(self) -> Tensor:
        x, self.x = self.x, None
        if x is not None:
            self.kept.put("input", (x.detach(),))
            return x
        kept = self.kept.take("input")
        if kept is None:
            raise RuntimeError("what a layer keeps is for one backward pass, and this is the second")
        return kept[0].requires_grad_(self.requires_grad)
