"""From sample numbers to what the decoder takes: rows, order, plan and masks of each micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from farspan.data.batch import Batch, make_batch
from farspan.data.corpus import Corpus
from farspan.data.prepared import Prepared
from farspan.data.rows import IGNORED, Row, Rows
from farspan.kernels import IntervalMask
from farspan.models.config import ModelConfig
from farspan.models.decoder import DecoderInput
from farspan.parallel import orders, plans
from farspan.parallel.mesh import Mesh
from farspan.parallel.prepare import prepare
from farspan.parallel.verify import PlanError, verify
from farspan.trainer.config import RunConfig
from farspan.trainer.first_rows import step_rows
from farspan.trainer.plan_choice import plan_name


class Feed:
    """Training and held-out batches of this rank."""

    def __init__(self, config: RunConfig, model: ModelConfig, prepared: Prepared, mesh: Mesh) -> None:
        train, parallel = config.train, config.parallel
        self.mesh = mesh
        self.across_documents = config.attention.across_documents
        self.heads = (model.heads // parallel.tensor, model.kv_heads // parallel.tensor)
        self.order = orders.build(parallel.order, train.sequence_length, parallel.context, parallel.stripe)
        self.steps = step_rows(config, prepared, mesh.degrees.data)
        self.plan_name, self.plan_reason = plan_name(config, self.order, self._first_mask)
        heldout = Rows(Corpus(prepared, "heldout"), train.sequence_length, config.run.seed)
        self.heldout = heldout
        self.heldout_rows = min(config.eval.rows, len(heldout))

    def training_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step (from 0)."""
        batches = []
        for micro_batch in range(self.steps.micro_batches):
            samples = self.steps.samples(step, micro_batch, self.mesh.data_rank)
            batches.append(self._batch([self.steps.row(sample) for sample in samples], samples))
        return batches

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

    def verify_plan(self) -> str:
        """Collective: checks the plan of the first batch, and that all context ranks made the same one; its digest.

        PlanError when either is not so: carried out, such a plan would train on wrong attention or hang.
        """
        batch = self.training_batches(0)[0]
        plan = plans.build(self.plan_name, batch.order, batch.mask, self.heads)
        verify(plan, batch.order, batch.mask)
        digests: list[str] = [""] * self.mesh.degrees.context
        dist.all_gather_object(digests, plan.digest(), group=self.mesh.context)
        if len(set(digests)) != 1:
            raise PlanError(f"ranks of one context group made different plans from one batch: {', '.join(digests)}")
        return plan.digest()

    def decoder_input(self, batch: Batch) -> DecoderInput:
        """Moves a batch to the device, with the plan that all ranks of the context group derive alike from its mask."""
        plan = plans.build(self.plan_name, batch.order, batch.mask, self.heads)
        device = self.mesh.device
        return DecoderInput(
            tokens=batch.tokens.to(device),
            labels=batch.labels.to(device),
            rotary_positions=batch.rotary_positions.to(device),
            plan=prepare(plan, batch.order, batch.mask, self.mesh.context_rank, device),
            group=self.mesh.context,
        )

    def _first_mask(self) -> IntervalMask:
        """That of the first micro-batch of data rank 0, on all ranks."""
        rows = [self.steps.row(sample) for sample in self.steps.samples(0, 0, 0)]
        return make_batch(rows, self.order, 0, across_documents=self.across_documents).mask

    def _batch(self, rows: Sequence[Row], samples: Sequence[int]) -> Batch:
        return make_batch(rows, self.order, self.mesh.context_rank, samples, self.across_documents)
