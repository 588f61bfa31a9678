"""What an index asks of each rank at each stage of a ring, counted exactly."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from farspan.kernels.index import Index, Places, VerticalSlashIndex
from farspan.parallel.orders import Order


def work(index: Index, order: Order, row: int = 0) -> np.ndarray:
    """(row, key) pairs that kernels compute, int64 `[query heads, world, stages]`, for one row of the batch.

    At stage s rank r has the keys of rank r - s. A selected tile counts whole; a column counts all rows at or behind
    its block, but those of tiles that are selected.

    Why striped order balances diagonals: with blocks dealt out in turn, rank r holds blocks b = r mod world. Block q of
    rank r and block k of rank r - s lie on diagonal q - k = s mod world. So at stage s every rank works on the same
    diagonals, those of one residue class, and on each of them the ranks' tiles differ by at most one.
    """
    found = _of_diagonals(index, order, row) if isinstance(index, VerticalSlashIndex) else _of_tiles(index, order, row)
    ranks = np.arange(order.world)
    return np.stack([found[:, ranks, (ranks - stage) % order.world] for stage in ranks], -1).astype(np.int64)


def _of_diagonals(index: VerticalSlashIndex, order: Order, row: int) -> np.ndarray:
    """fp64 `[query heads, world, world]`: pairs by the rank of the rows and that of the keys."""
    block, world = index.block, order.world
    owner, tiles, holds = _of_order(order, block)
    blocks = len(owner)
    diagonals = index.diagonals[row].cpu().numpy()
    columns = index.columns[row].cpu().numpy()
    # Products of counts below 2^53, which fp64 has exactly.
    found = block**2 * (diagonals.astype(np.float64) @ tiles).reshape(-1, world, world)
    for head, (selected, listed) in enumerate(zip(diagonals, columns)):
        of_block = np.bincount(listed[listed < index.length] // block, minlength=blocks)
        # [rank, block]: the rank's row blocks at or behind a block of keys whose tile is not selected; a correlation.
        behind = np.fft.irfft(holds * np.fft.rfft(~selected, 2 * blocks).conj(), 2 * blocks)[:, :blocks].round()
        for source in range(world):
            found[head, :, source] += block * (behind * (of_block * (owner == source))).sum(1)
    return found


def _of_tiles(index: Index, order: Order, row: int) -> np.ndarray:
    """Likewise for an index without columns, by its tiles, head by head on its device."""
    owner = _owners(order, index.block)
    positions = np.arange(len(owner) * index.block)
    places = Places.of(positions, positions, index.block, index.device)
    holds = torch.from_numpy(owner == np.arange(order.world)[:, None]).to(index.device, torch.float64)
    found = []
    for head in range(index.heads):
        tiles = index.at(places, (head, head + 1)).tiles[row, 0].tril().double()
        found.append(index.block**2 * (holds @ tiles @ holds.T))
    return torch.stack(found).cpu().numpy()


@lru_cache(4)
def _of_order(order: Order, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What layers share: the rank of each block; fp64 `[blocks, world x world]`, of each diagonal the tiles of every
    rank's rows and every rank's keys; and the transform of which blocks each rank has.
    """
    owner = _owners(order, block)
    blocks, world = len(owner), order.world
    tiles = np.empty((blocks, world**2))  # 4 GiB for 256 ranks and a million tokens, so made in place
    for distance in range(blocks):
        pairs = owner[distance:] * world + owner[: blocks - distance]
        tiles[distance] = np.bincount(pairs, minlength=world**2)
    return owner, tiles, np.fft.rfft(owner == np.arange(world)[:, None], 2 * blocks)


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
