"""From sample numbers to what the decoder takes: rows, order, plan and masks of each micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from farspan.data.batch import Batch
from farspan.data.concatenated import ConcatRows
from farspan.data.corpus import Corpus
from farspan.data.prepared import Prepared
from farspan.data.rows import IGNORED, Row
from farspan.data.steps import deal
from farspan.kernels import to_device
from farspan.kernels.tiles import TILE
from farspan.models.attention import Selector
from farspan.models.config import ModelConfig
from farspan.models.decoder import DecoderInput
from farspan.parallel.estimate import Estimator
from farspan.parallel.mesh import Mesh
from farspan.parallel.prepare import prepare
from farspan.parallel.recall import Recall
from farspan.parallel.verify import PlanError, verify
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import RunConfig
from farspan.trainer.first_rows import training_steps
from farspan.trainer.plan_choice import build_plan, plan_names
from farspan.trainer.sparse import Sight, SparseAttention


class Feed:
    """Training and held-out batches of this rank."""

    def __init__(self, config: RunConfig, model: ModelConfig, prepared: Prepared, mesh: Mesh) -> None:
        self.mesh, self.config = mesh, config
        self.arrangement = Arrangement(config, mesh.degrees.context)
        self.steps = training_steps(config, prepared)
        # Those of data rank 0, on all ranks, so that all choose the same plan.
        first = [self.steps.row(sample) for sample in self._samples(0, 0)[0]]
        self.plans = plan_names(config, self.arrangement, first)
        heldout = ConcatRows(Corpus(prepared, "heldout"), config.train.sequence_length, config.run.seed)
        self.heldout = heldout
        self.heldout_rows = min(config.eval.rows, len(heldout))
        self.sparse = None if config.attention.sparse is None else SparseAttention(config, mesh.tensor_rank)
        self._ahead: tuple[int, list[Batch], DecoderInput] | None = None

    def look_ahead(self, step: int) -> None:
        """Makes a step's micro-batches, and the decoder's input of the first, while the device has something to do."""
        batches = self.training_batches(step)
        self._ahead = step, batches, self.decoder_input(batches[0], step)

    def training_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step (from 0)."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        dealt = self._samples(step, self.mesh.data_rank)
        return [self._batch([self.steps.row(sample) for sample in samples], samples) for samples in dealt]

    def heldout_batches(self) -> list[Batch]:
        """The held-out rows, shared out over data ranks; each takes equally many, a last one may have no labels."""
        batches = []
        for first in range(0, self.heldout_rows, self.mesh.degrees.data):
            index = first + self.mesh.data_rank
            row = self.heldout[min(index, self.heldout_rows - 1)]
            if index >= self.heldout_rows:
                row = replace(row, labels=np.full_like(row.labels, IGNORED), valid=0)
            batches.append(self._batch([row], [index]))
        return batches

    def verify_plan(self, step: int) -> str:
        """Collective: checks the plans of a step's first batch, and that all context ranks made the same; the digests.

        PlanError when either is not so: carried out, such a plan would train on wrong attention or hang.
        """
        batch = self.training_batches(step)[0]
        plans = dict(zip(self.arrangement.layers, self.decoder_input(batch, step).plans, strict=True))
        for seen, mask in batch.masks.items():
            verify(plans[seen].plan, batch.order, mask)
        mine = " and ".join(plans[seen].plan.digest() for seen in batch.masks)
        digests: list[str] = [""] * self.mesh.degrees.context
        dist.all_gather_object(digests, mine, group=self.mesh.context)
        if len(set(digests)) != 1:
            raise PlanError(f"ranks of one context group made different plans from one batch: {', '.join(digests)}")
        return mine

    def decoder_input(self, batch: Batch, step: int | None = None) -> DecoderInput:
        """Moves a batch to the device, with the plans that all ranks of the context group derive alike from its masks.

        Layers that see alike share one. `step` is that which trains on the batch; None for evaluation.
        """
        if self._ahead is not None and self._ahead[1][0] is batch:
            return self._ahead[2]
        rank, device = self.mesh.context_rank, self.mesh.device
        plans = {
            seen: prepare(
                build_plan(self.config, self.plans[seen].name, batch.order, mask),
                batch.order,
                mask,
                rank,
                device,
                sparse_block=None if self.sparse is None else TILE,
            )
            for seen, mask in batch.masks.items()
        }
        return DecoderInput(
            tokens=to_device(batch.tokens, device),
            labels=to_device(batch.labels, device),
            rotary_positions=to_device(batch.rotary_positions, device),
            plans=[plans[seen] for seen in self.arrangement.layers],
            group=self.mesh.links,
            selectors=None if self.sparse is None else self._selectors(self.sparse, batch, step),
        )

    def _selectors(self, sparse: SparseAttention, batch: Batch, step: int | None) -> list[Selector | None]:
        """Layers that see alike share an estimator."""
        layers, order, sights = self.arrangement.layers, batch.order, {}
        rank, device = self.mesh.context_rank, self.mesh.device
        group = None if self.mesh.degrees.context == 1 else self.mesh.context
        for seen in dict.fromkeys(layers[layer] for layer in sparse.layers):
            mask, recall = batch.masks[seen], None
            estimator = Estimator(order, mask, sparse.settings.settings, rank, group, device)
            if step is not None and sparse.reports(step):
                recall = Recall(sparse.recall_rows(step), order, mask, rank, group, device)
            sights[seen] = Sight(estimator, recall)
        return sparse.selectors([sights[seen] if i in sparse.layers else None for i, seen in enumerate(layers)])

    def _samples(self, step: int, data_rank: int) -> list[Sequence[int]]:
        return deal(self.steps.samples(step), self.config.train.micro_batch_rows, self.mesh.degrees.data, data_rank)

    def _batch(self, rows: Sequence[Row], samples: Sequence[int]) -> Batch:
        return self.arrangement.batch(rows, self.mesh.context_rank, samples)
