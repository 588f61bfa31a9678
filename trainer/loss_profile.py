"""The loss by length of documents and by position in them, in powers of two: where a long context helps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from farspan.data.batch import Batch
from farspan.data.rows import IGNORED
from farspan.kernels import to_device
from farspan.parallel.mesh import Mesh

BUCKETS = 40  # the last one holds lengths from 2^39 tokens on
KINDS = ("length", "position")
UNIT = 2.0**-28


class LossProfile:
    """Sums of token losses of some micro-batches, by log2 of the length of a token's document and of its place in it.

    A document is what its row holds of it, which is all that its tokens can see, unless `attention.across_documents`
    lets them see those before it in the row as well. The position of a token is the number of tokens before it in the
    document, and 1 for its first one, too, so that a document of 2^k tokens fills its last bucket. Sums are whole
    multiples of 2^-28: how tokens are shared out over ranks and in which order they are added changes no bit of them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        # Losses and counts of each kind; the bucket behind the last is that of tokens without a label.
        self._sums = torch.zeros(len(KINDS), 2, BUCKETS + 1, dtype=torch.int64, device=mesh.device)

    def add(self, batch: Batch, losses: Tensor) -> None:
        """The losses `[rows, slots]` of this rank's share of a micro-batch."""
        whole = (losses.flatten().double() / UNIT).round().long()
        parts = torch.stack((whole, torch.ones_like(whole)))
        for sums, buckets in zip(self._sums, buckets_of(batch), strict=True):
            sums.index_add_(1, to_device(buckets.flatten(), parts.device), parts)

    def means(self) -> dict[str, float]:
        """Collective over the ranks that share the loss: mean loss and count of each bucket that has tokens.

        Named by kind and the least length or position of the bucket: `loss_length_256`, `tokens_position_1`.
        """
        dist.all_reduce(self._sums, group=self._mesh.loss)
        found: dict[str, float] = {}
        for kind, (losses, counts) in zip(KINDS, self._sums[..., :BUCKETS].tolist(), strict=True):
            for log2, (loss, count) in enumerate(zip(losses, counts, strict=True)):
                if count:
                    found[f"loss_{kind}_{1 << log2}"] = loss * UNIT / count
                    found[f"tokens_{kind}_{1 << log2}"] = count
        return found


def buckets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """int64 `[rows, slots]` each, in the slots of this rank: the buckets of lengths and of positions."""
    lengths = np.stack([_log2(np.repeat(np.diff(bounds), np.diff(bounds))) for bounds in batch.bounds])
    positions = np.stack([_log2(np.maximum(_places(bounds), 1)) for bounds in batch.bounds])
    unlabelled = batch.labels == IGNORED

    def shard(buckets: NDArray[np.int64]) -> Tensor:
        here = batch.order.shard(torch.from_numpy(buckets), batch.rank, padding=BUCKETS)
        return torch.where(unlabelled, BUCKETS, here)

    return shard(lengths), shard(positions)


def _places(bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 `[length]`: tokens before each in its document."""
    return np.concatenate([np.arange(stop - start) for start, stop in pairwise(bounds.tolist())])


def _log2(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rounded down, exactly, of numbers from 1."""
    exponents: NDArray[np.int64] = np.frexp(numbers)[1].astype(np.int64) - 1
    return np.minimum(exponents, BUCKETS - 1)
