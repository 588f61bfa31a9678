"""Probes: the rows by whose attention an index is chosen, and what they see of the keys of one device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.estimate.settings import VerticalSlash
from farspan.kernels.index import Places
from farspan.kernels.masks import IntervalMask, stack
from farspan.kernels.tiles import TILE
from farspan.kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class Probes:
    """Probe rows beside the keys of one device; built once a batch.

    The rows are sets of `size` consecutive positions, so that a set lies in two blocks of positions at most:
    `first_block` int32 `[B or 1, sets]` and the next. `blocks` int32 `[B or 1, sets x size]` is each row's own.
    `visible`: the rows' mask in key slots, causal whatever the mask of the row is. `k_blocks` int32 `[key tiles]`.
    `length`: of the whole row.
    """

    size: int
    first_block: Tensor
    blocks: Tensor
    visible: IntervalMask
    k_blocks: Tensor
    keys: int
    length: int

    @property
    def sets(self) -> int:
        return self.first_block.shape[1]

    @property
    def rows(self) -> int:
        return self.blocks.shape[1]

    @staticmethod
    def of(
        positions: np.ndarray, mask: IntervalMask, k_positions: np.ndarray, device: torch.device | str = "cpu"
    ) -> Probes:
        """`positions` as `probe_positions` gives them; ValueError where tiles of keys are not blocks of positions."""
        places = Places.of(k_positions, k_positions, TILE, device)
        visible = stack(_visible(positions[b].reshape(-1), mask, b, k_positions) for b in range(len(positions)))
        absent = positions >= mask.rows
        blocks = np.where(absent, 0, positions // TILE)
        # Absent rows come first in a set, so the last row tells; a set of absent rows alone sees nothing anywhere.
        first = np.where(absent, blocks[:, :, -1:], blocks).min(-1)

        def put(x: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(x.astype(np.int32)), device)

        rows = blocks.reshape(len(blocks), -1)
        size, keys = positions.shape[2], len(k_positions)
        return Probes(size, put(first), put(rows), visible.to(device), places.k_blocks, keys, mask.rows)


def probe_positions(mask: IntervalMask, settings: VerticalSlash) -> np.ndarray:
    """int64 `[B or 1, sets, probes]`: positions, ascending in each set; `mask.rows` where a set has fewer, first.

    A document's set ends where the document does, and has no row of the one before.
    """
    length, segments = mask.rows, settings.segments
    ends = {length * (i + 1) // segments: 0 for i in range(segments) if length * (i + 1) // segments}
    starts_by_end = [{**ends, **_documents(mask, b, settings.documents)} for b in range(mask.batch)]
    sets = max(map(len, starts_by_end))
    positions = np.full((mask.batch, sets, settings.probes), length)
    for b, starts in enumerate(starts_by_end):
        for i, (end, start) in enumerate(sorted(starts.items())):
            rows = np.arange(max(start, end - settings.probes), end)
            positions[b, i, settings.probes - len(rows) :] = rows
    return positions


def _documents(mask: IntervalMask, b: int, most: int) -> dict[int, int]:
    """Start of each of the longest documents by its end; a document starts with a row that sees nothing before it."""
    lowest = torch.minimum(mask.begin, mask.anchor_begin)[b].numpy()
    starts = np.union1d(0, np.flatnonzero(lowest == np.arange(mask.rows)))
    ends = np.append(starts[1:], mask.rows)
    longest = np.argsort(starts - ends, kind="stable")[:most]
    return dict(zip(ends[longest].tolist(), starts[longest].tolist()))


def _visible(positions: np.ndarray, mask: IntervalMask, b: int, k_positions: np.ndarray) -> IntervalMask:
    """`[1, probes]`: what probes of one row of the batch see of some keys, in their slots; absent ones nothing."""
    present = torch.from_numpy(positions < mask.rows)
    row = torch.from_numpy(np.where(positions < mask.rows, positions, 0))
    begin, end, anchor_begin, anchor_end = (bound[b, row] * present for bound in mask.bounds)
    past = (row + 1) * present
    causal = IntervalMask(
        *(x[None] for x in (begin, torch.minimum(end, past), anchor_begin, torch.minimum(anchor_end, past)))
    )
    return causal.at(range(len(positions)), k_positions)
