"""Dynamic sparse attention in a run: which layers select, when, and what is known of their selections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import estimate, to_device
from farspan.kernels.index import Index
from farspan.models.attention import Selector
from farspan.parallel.estimate import Estimator
from farspan.parallel.mesh import Mesh
from farspan.parallel.recall import Recall
from farspan.parallel.sieve import Sieve
from farspan.trainer.budgets import Budgets
from farspan.trainer.config import RunConfig

_RECALL_ROWS = 64


@dataclass(frozen=True, eq=False)
class Selected:
    """A layer's selection at a step, estimated then or before (`attention.sparse.refresh`).

    `recall` `[B, H, rows]`, of rows at random, is set at steps that are reported, and `sieve`, by which what is sent
    can be counted, then as well, if keys and values travel.
    """

    step: int
    estimated: int
    index: Index
    recall: Tensor | None
    sieve: Sieve | None = None


@dataclass(frozen=True, eq=False)
class Sight:
    """What serves all sparse layers that see alike, for one micro-batch.

    `recall` where selections are measured; `sieve` in reported steps, or where the wire is sparse, if keys and values
    travel.
    """

    estimator: Estimator
    recall: Recall | None
    sieve: Sieve | None = None


class SparseAttention:
    """Selects for the layers of one rank. `begin` says what comes next: a step of training, or an evaluation."""

    def __init__(self, config: RunConfig, tensor_rank: int = 0) -> None:
        settings = config.attention.sparse
        assert settings is not None
        self.settings, self.seed = settings, config.run.seed
        self.layers = settings.layers(config.model.layers, config.attention.window)
        self.budgets = None
        if settings.budgets is not None:
            self.budgets = Budgets.read(settings.budgets, config)
        self.tensor_rank = tensor_rank
        self._on_device: dict[int, estimate.Budgets] = {}
        self.newest: dict[int, Selected] = {}
        self._evaluated: dict[int, list[Tensor]] = {}  # by layer, density and recall of each of its batches
        self.step, self.training = 0, True
        self.watch: Callable[[int, Index], None] | None = None
        """Is told what a layer would select, while attention stays dense."""

    def begin(self, step: int, training: bool) -> None:
        """`step` counts from 0; an evaluation is that of the step before."""
        self.step, self.training = step, training
        self._evaluated.clear()

    @property
    def active(self) -> bool:
        settings = self.settings
        return settings.train and self.step >= settings.dense_steps if self.training else settings.evaluate

    def reports(self, step: int | None) -> bool:
        """Whether a step's selections are measured, too; None for evaluation, whose always are."""
        if step is None:
            return self.settings.evaluate
        return step % self.settings.report_every == 0 or step == self.settings.dense_steps

    def recall_rows(self, step: int, length: int) -> np.ndarray:
        """Positions in rows of this length, ascending: the same on all ranks."""
        draw = np.random.default_rng((self.seed, step))
        return np.sort(draw.choice(length, min(_RECALL_ROWS, length), replace=False))

    def selectors(self, sights: Sequence[Sight | None]) -> list[Selector | None]:
        """For each layer, by what it sees; None for those that are always dense."""
        return [None if sight is None else self._selector(layer, sight) for layer, sight in enumerate(sights)]

    def _budgets(self, layer: int, q: Tensor) -> estimate.Budgets | None:
        """Those of this tensor rank's heads, on its device."""
        if self.budgets is None or layer in self._on_device:
            return self._on_device.get(layer)
        heads = slice(self.tensor_rank * q.shape[2], (self.tensor_rank + 1) * q.shape[2])
        numbers = torch.tensor([self.budgets.columns[layer][heads], self.budgets.diagonals[layer][heads]])
        self._on_device[layer] = estimate.Budgets(*to_device(numbers, q.device))
        return self._on_device[layer]

    def _selector(self, layer: int, sight: Sight) -> Selector:
        def select(q: Tensor, k: Tensor) -> Index | None:
            if self.watch is not None:
                self.watch(layer, sight.estimator(q, k)[0])
                return None
            if not self.active:
                return None
            refresh, kept = self.settings.refresh, self.newest.get(layer)
            if self.training and refresh > 1 and kept and kept.estimated // refresh == self.step // refresh:
                index, estimated = kept.index, kept.estimated
            else:
                index, _ = sight.estimator(q, k, budgets=self._budgets(layer, q))
                estimated = self.step
            recall = None if sight.recall is None else sight.recall(q, k, index)
            if self.training:
                self.newest[layer] = Selected(self.step, estimated, index, recall, sight.sieve)
            elif recall is not None:
                density = index.density().double().mean()
                self._evaluated.setdefault(layer, []).append(torch.stack([density, recall.double().mean()]))
            return index

        return select

    def of_evaluation(self, mesh: Mesh) -> dict[str, float]:
        """Mean density and recall of what was selected since the evaluation began, all and by layer; collective."""
        if not self._evaluated:
            return {}
        means = torch.stack([torch.stack(found).mean(0) for found in self._evaluated.values()])
        for group in (mesh.loss, mesh.tensor):
            dist.all_reduce(means, group=group)
            means /= group.size()
        named: dict[str, float] = {}
        for name, of_layers in zip(("sparse_density", "sparse_recall"), means.T.tolist()):
            named |= {name: sum(of_layers) / len(of_layers), **by_layer(name, self._evaluated, of_layers)}
        return named


def by_layer(name: str, layers: Iterable[int], values: Iterable[float]) -> dict[str, float]:
    """What is measured in several layers, under the names of `metrics.jsonl`."""
    return {f"{name}_layer_{layer:02d}": value for layer, value in zip(layers, values, strict=True)}


def of_all_heads(mine: Tensor, tensor: dist.ProcessGroup) -> Tensor:
    """`[any, heads, ...]` of all tensor ranks' heads; collective."""
    parts = [torch.empty_like(mine) for _ in range(tensor.size())]
    dist.all_gather(parts, mine.contiguous(), group=tensor)
    return torch.cat(parts, 1)
