"""What a vertical-slash index asks of each rank at each stage of a ring, counted exactly."""

from __future__ import annotations

import numpy as np

from farspan.kernels.index import VerticalSlashIndex
from farspan.parallel.orders import Order


def work(index: VerticalSlashIndex, order: Order, row: int = 0) -> np.ndarray:
    """(row, key) pairs that kernels compute, int64 `[query heads, world, stages]`, for one row of the batch.

    At stage s rank r has the keys of rank r - s. A selected tile counts whole; a column counts all rows at or behind
    its block, but those of tiles that are selected.

    Why striped order balances diagonals: with blocks dealt out in turn, rank r holds blocks b = r mod world. Block q of
    rank r and block k of rank r - s lie on diagonal q - k = s mod world. So at stage s every rank works on the same
    diagonals, those of one residue class, and on each of them the ranks' tiles differ by at most one.
    """
    owner = _owners(order, index.block)
    blocks = len(owner)
    diagonals = index.diagonals[row].cpu().numpy()
    columns = index.columns[row].cpu().numpy()
    found = np.zeros((len(diagonals), order.world * order.world), np.int64)
    for head, (selected, listed) in enumerate(zip(diagonals, columns)):
        for distance in np.flatnonzero(selected):
            pair = owner[distance:] * order.world + owner[: blocks - distance]
            found[head] += index.block**2 * np.bincount(pair, minlength=order.world**2)
        at, count = np.unique(listed[listed < index.length] // index.block, return_counts=True)
        for block, many in zip(at, count):
            pair = owner[block:][~selected[: blocks - block]] * order.world + owner[block]
            found[head] += index.block * many * np.bincount(pair, minlength=order.world**2)
    ranks = np.arange(order.world)
    by_source = found.reshape(-1, order.world, order.world)
    return np.stack([by_source[:, ranks, (ranks - stage) % order.world] for stage in ranks], -1)


def _owners(order: Order, block: int) -> np.ndarray:
    """The rank of each block; ValueError if a block is not on one rank."""
    owner = np.full(-(-order.length // block), -1)
    for rank, positions in enumerate(order.positions):
        real = positions[positions < order.length]
        mine, first = np.unique(real // block, return_index=True)
        if (real[first] % block).any() or (owner[mine] >= 0).any():
            raise ValueError(f"blocks of {block} tokens are not each on one rank in {order.name} order")
        owner[mine] = rank
    return owner
