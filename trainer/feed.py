"""From sample numbers to what the decoder takes: rows, order, plan and masks of each micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from farspan.data.batch import Batch
from farspan.data.prefetch import Prefetch
from farspan.data.rows import IGNORED, Row, blank_row
from farspan.data.steps import deal
from farspan.data.visibility import Visibility
from farspan.kernels import to_device
from farspan.kernels.tiles import TILE
from farspan.models.attention import Selector
from farspan.models.config import ModelConfig
from farspan.models.decoder import DecoderInput
from farspan.parallel.estimate import Estimator
from farspan.parallel.mesh import Mesh
from farspan.parallel.plans import KEYS_TRAVEL
from farspan.parallel.prepare import PreparedPlan, prepare
from farspan.parallel.recall import Recall
from farspan.parallel.sieve import Sieve
from farspan.parallel.verify import PlanError, verify
from farspan.trainer.config import RunConfig
from farspan.trainer.first_rows import RunRows, whole_rows
from farspan.trainer.plan_choice import build_plan
from farspan.trainer.row_length import for_rows
from farspan.trainer.sharing import Sharing
from farspan.trainer.sparse import Sight, SparseAttention


class Feed:
    """Training and held-out batches of this rank; `close` it when done."""

    def __init__(self, config: RunConfig, model: ModelConfig, rows: RunRows, mesh: Mesh) -> None:
        self.mesh, self.config = mesh, config
        self.steps, self.heldout = rows.steps, rows.heldout
        self.heldout_rows = min(config.eval.rows, len(self.heldout))
        self.sharings = {length: self._sharing(length) for length in self.steps.lengths}
        self.sparse = None if config.attention.sparse is None else SparseAttention(config, mesh.tensor_rank)
        self._ahead: tuple[int, list[Batch], DecoderInput] | None = None
        self._prefetch = Prefetch(self._rows, config.data.workers, config.parallel.timeout_seconds)

    def close(self) -> None:
        self._prefetch.close()

    @property
    def longest(self) -> Sharing:
        """That of the longest rows, which held-out ones are too."""
        return self.sharings[self.config.train.sequence_length]

    def sharing_of_step(self, step: int) -> Sharing:
        return self.sharings[self.steps.length(step)]

    def look_ahead(self, step: int) -> None:
        """Makes a step's micro-batches, and the decoder's input of the first, while the device has something to do."""
        batches = self.training_batches(step)
        self._ahead = step, batches, self.decoder_input(batches[0], step)

    def training_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step (from 0)."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        sharing = self.sharing_of_step(step)
        micro_batches = zip(self._prefetch(step), self._dealt(step), strict=True)
        return [self._batch(sharing, rows, samples) for rows, samples in micro_batches]

    def heldout_batches(self) -> list[Batch]:
        """The held-out rows, shared out over data ranks; each takes equally many, a last one may have no labels."""
        sharing = self.longest
        batches = []
        for first in range(0, self.heldout_rows, sharing.mesh.degrees.data):
            index = first + sharing.mesh.data_rank
            row = self.heldout[min(index, self.heldout_rows - 1)]
            if index >= self.heldout_rows:
                row = replace(row, labels=np.full_like(row.labels, IGNORED), valid=0)
            batches.append(self._batch(sharing, [row], [index]))
        return batches

    def verify_plans(self, step: int) -> str:
        """Collective: checks the plans of a step's first batch, and that all context ranks made the same; the digests.
        Likewise for rows of all other lengths, with one document each.

        PlanError when something is not so: carried out, such a plan would train on wrong attention or hang.
        """
        for length, sharing in self.sharings.items():
            if length != self.steps.length(step):
                self._verify(self._batch(sharing, [blank_row(length)] * sharing.micro_batch_rows, []))
        return self._verify(self.training_batches(step)[0], step)

    def decoder_input(self, batch: Batch, step: int | None = None) -> DecoderInput:
        """Moves a batch to the device, with the plans that all ranks of the context group derive alike from its masks.

        Layers that see alike share one. `step` is that which trains on the batch; None for evaluation.
        """
        if self._ahead is not None and self._ahead[1][0] is batch:
            return self._ahead[2]
        sharing, device = self.sharings[batch.order.length], self.mesh.device
        plans = {
            seen: prepare(
                build_plan(sharing.config, sharing.plans[seen].name, batch.order, mask),
                batch.order,
                mask,
                sharing.mesh.context_rank,
                device,
                sparse_block=None if self.sparse is None else TILE,
                sparse_wire=self.config.parallel.sparse_wire,
            )
            for seen, mask in batch.masks.items()
        }
        return DecoderInput(
            tokens=to_device(batch.tokens, device),
            labels=to_device(batch.labels, device),
            rotary_positions=to_device(batch.rotary_positions, device),
            plans=[plans[seen] for seen in sharing.arrangement.layers],
            group=sharing.mesh.links,
            selectors=None if self.sparse is None else self._selectors(self.sparse, sharing, batch, plans, step),
        )

    def _selectors(
        self,
        sparse: SparseAttention,
        sharing: Sharing,
        batch: Batch,
        plans: Mapping[Visibility, PreparedPlan],
        step: int | None,
    ) -> list[Selector | None]:
        """Layers that see alike share an estimator."""
        layers, order, mesh, sights = sharing.arrangement.layers, batch.order, sharing.mesh, {}
        group = None if mesh.degrees.context == 1 else mesh.context
        for seen in dict.fromkeys(layers[layer] for layer in sparse.layers):
            mask, recall, sieve = batch.masks[seen], None, plans[seen].sieve
            estimator = Estimator(order, mask, sparse.settings.settings, mesh.context_rank, group, mesh.device)
            if sparse.reports(step):
                rows = sparse.recall_rows(step or 0, order.length)
                recall = Recall(rows, order, mask, mesh.context_rank, group, mesh.device)
                if step is not None and sieve is None and sharing.plans[seen].name in KEYS_TRAVEL and order.world > 1:
                    sieve = Sieve(plans[seen].plan, order, mask, mesh.context_rank, TILE, mesh.device)
            sights[seen] = Sight(estimator, recall, sieve)
        return sparse.selectors([sights[seen] if i in sparse.layers else None for i, seen in enumerate(layers)])

    def _verify(self, batch: Batch, step: int | None = None) -> str:
        sharing = self.sharings[batch.order.length]
        plans = dict(zip(sharing.arrangement.layers, self.decoder_input(batch, step).plans, strict=True))
        for seen, mask in batch.masks.items():
            verify(plans[seen].plan, batch.order, mask)
        mine = " and ".join(plans[seen].plan.digest() for seen in batch.masks)
        digests: list[str] = [""] * sharing.mesh.degrees.context
        dist.all_gather_object(digests, mine, group=sharing.mesh.context)
        if len(set(digests)) != 1:
            raise PlanError(f"ranks of one context group made different plans from one batch: {', '.join(digests)}")
        return mine

    def _sharing(self, length: int) -> Sharing:
        """On all ranks judged by the first rows of data rank 0, so that all choose the same plan."""
        rows: list[Row] = []
        if length == self.steps.length(0):
            rows = whole_rows(self.steps, for_rows(self.config, length).train.micro_batch_rows)
        return Sharing.of(self.config, self.mesh, length, rows)

    def _dealt(self, step: int) -> list[Sequence[int]]:
        """The samples of each of this rank's micro-batches."""
        sharing = self.sharing_of_step(step)
        mesh = sharing.mesh
        return deal(self.steps.samples(step), sharing.micro_batch_rows, mesh.degrees.data, mesh.data_rank)

    def _rows(self, step: int) -> list[list[Row]]:
        return [[self.steps.row(sample) for sample in samples] for samples in self._dealt(step)]

    def _batch(self, sharing: Sharing, rows: Sequence[Row], samples: Sequence[int]) -> Batch:
        return sharing.arrangement.batch(rows, sharing.mesh.context_rank, samples)
