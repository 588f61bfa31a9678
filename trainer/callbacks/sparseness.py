"""What layers selected in a step: its density, the attention that it covers, and how evenly ranks share its work."""

from __future__ import annotations

import numpy as np
import torch

from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel.balance import imbalance, stage_imbalance, step_imbalance
from farspan.parallel.index_work import work
from farspan.parallel.sieve import bytes_sent
from farspan.trainer.callbacks.recording import Recording
from farspan.trainer.sparse import Selected, SparseAttention, by_layer, of_all_heads
from farspan.trainer.trainer import StepRecord, Trainer

_IMBALANCES = {
    "sparse_imbalance_ranks": imbalance,
    "sparse_imbalance_lockstep": stage_imbalance,
    "sparse_imbalance_steps": step_imbalance,
}


class Sparseness:
    """Adds to a step's record; comes before `Recording`, which is given on the rank that writes."""

    def __init__(self, sparse: SparseAttention, recording: Recording | None) -> None:
        self.sparse, self.recording = sparse, recording

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        step = record.step - 1
        found = {layer: selected for layer, selected in self.sparse.newest.items() if selected.step == step}
        sharing = trainer.feed.sharing_of_step(step)
        if not found or sharing.mesh.data_rank or sharing.mesh.context_rank:  # the others selected the same, or alike
            return
        tensor, order = trainer.mesh.tensor, sharing.arrangement.order()
        density = of_all_heads(torch.stack([selected.index.density()[0] for selected in found.values()]), tensor)
        record.further["sparse_density"] = float(density.mean())
        indexes = [selected.index for selected in found.values()]
        counts = [index.column_counts()[0].double() for index in indexes if isinstance(index, VerticalSlashIndex)]
        if counts:
            record.further["sparse_columns"] = float(of_all_heads(torch.stack(counts), tensor).mean())
        record.further |= by_layer("sparse_density", found, (float(line.mean()) for line in density))
        recalls = [selected.recall.mean((0, 2)).double() for selected in found.values() if selected.recall is not None]
        if not recalls:
            return
        recall = of_all_heads(torch.stack(recalls), tensor)
        pairs = np.stack([work(selected.index, order) for selected in found.values()])
        by_stage = of_all_heads(torch.from_numpy(pairs).to(density.device), tensor)
        record.further["sparse_recall"] = float(recall.mean())
        record.further |= by_layer("sparse_recall", found, (float(line.mean()) for line in recall))
        of_layers = by_stage.sum(1).cpu().numpy()
        whole = of_layers.sum(0)
        for name, measure in _IMBALANCES.items():
            record.further |= {name: measure(whole), **by_layer(name, found, map(measure, of_layers))}
        self._traffic(trainer, record, found)
        if self.recording is not None:
            board = self.recording.tensorboard
            of_all = np.full((trainer.config.model.layers, density.shape[1]), np.nan)  # other layers select nothing
            of_all[list(found)] = density.cpu().numpy()
            board.heat_map(record.step, "sparse/density by layer and head", of_all, 1.0)
            board.heat_map(record.step, "sparse/work by rank and stage", whole, whole.max())

    def _traffic(self, trainer: Trainer, record: StepRecord, found: dict[int, Selected]) -> None:
        """Bytes that a sequence's ranks send for a layer, forward and backward, where it is keys and values alone."""
        model, train = trainer.config.model, trainer.feed.sharing_of_step(record.step - 1).config.train
        rows, itemsize = train.micro_batch_rows, 2 if train.dtype == "bf16" else 4
        sent = {
            layer: bytes_sent(selected.sieve, selected.index, model.head_dim, rows, itemsize)
            for layer, selected in found.items()
            if selected.sieve is not None
        }
        if not sent:
            return
        mine = torch.tensor(list(sent.values()), device=trainer.mesh.device)[:, None]
        of_layers = of_all_heads(mine, trainer.mesh.tensor).sum(1).cpu()
        for name, line in zip(("sparse_wire_bytes", "sparse_dense_wire_bytes"), of_layers.T):
            record.further[name] = float(line.double().mean())
            record.further |= by_layer(name, sent, map(float, line))
