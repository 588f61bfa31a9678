"""`memory.keep_layers: auto`: as many layers keep everything as the GPU has memory for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from farspan.models.decoder import Decoder
from farspan.trainer.trainer import StepRecord, Trainer

RESERVE = 0.05  # of the device's memory: for documents of other lengths, evaluation, and holes between tensors


class Keeping:
    """Raises the number of layers that are not computed again after the first steps, until no other one fits.

    What fits is measured: what a step left free of the device, and what the last layer, which keeps everything from the
    first step on, holds after its forward pass. One layer more adds at most that to what is allocated at any moment of
    a step, and often less, so the next step is measured again. The first step is not: it allocates what stays.

    All ranks take the smallest number, for ranks that share a layer speak to each other when they compute it again.
    The number changes no bit of the loss, so a resumed run need not know it and measures anew.
    """

    def __init__(self, model: Decoder, report: Callable[[str], None]) -> None:
        self.recomputation, self.layers, self.report = model.run_layers, len(model.layers), report
        self._steps = self._layer_bytes = 0
        last = model.layers[-1]
        self._hooks = [last.register_forward_pre_hook(self._enter), last.register_forward_hook(self._leave)]

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if not self._hooks:
            return
        self._steps += 1
        if self._steps > 1:
            self._change(trainer.mesh.control)
        # What the allocator holds after the next step is then what that step took.
        torch.cuda.empty_cache()

    def _change(self, ranks: dist.ProcessGroup) -> None:
        """Collective: as many layers more as fit on every rank; fewer where the reserve is not free."""
        free, total = torch.cuda.mem_get_info()
        more = torch.tensor((free - int(RESERVE * total)) // self._layer_bytes)
        dist.all_reduce(more, dist.ReduceOp.MIN, ranks)
        before = self.recomputation.keep_layers
        self.recomputation.keep_layers = min(max(before + int(more), 0), self.layers)
        if self.recomputation.keep_layers <= before:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self.report(
                f"memory.keep_layers auto: the last {self.recomputation.keep_layers} of {self.layers} layers keep "
                f"everything, {self._layer_bytes / 2**30:.2f} GiB each; {free / 2**30:.1f} of {total / 2**30:.1f} GiB "
                "are free"
            )

    def _enter(self, *_: object) -> None:
        self._before = torch.cuda.memory_allocated()

    def _leave(self, *_: object) -> None:
        if torch.is_grad_enabled():
            # The largest so far: a call may happen to free what something else had left behind.
            self._layer_bytes = max(self._layer_bytes, torch.cuda.memory_allocated() - self._before)
