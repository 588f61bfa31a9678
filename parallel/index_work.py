"""What an index asks of each rank at each stage of a ring, counted exactly, head by head on the index's device."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.index import Index, Places, VerticalSlashIndex
from farspan.parallel.orders import Order

_RANKS = 32  # whose blocks are counted at once


def work(index: Index, order: Order, row: int = 0) -> np.ndarray:
    """(row, key) pairs that kernels compute, int64 `[query heads, world, stages]`, for one row of the batch.

    At stage s rank r has the keys of rank r - s. A selected tile counts whole; a column counts all rows at or behind
    its block, but those of tiles that are selected.

    Why striped order balances diagonals: with blocks dealt out in turn, rank r holds blocks b = r mod world. Block q of
    rank r and block k of rank r - s lie on diagonal q - k = s mod world. So at stage s every rank works on the same
    diagonals, those of one residue class, and on each of them the ranks' tiles differ by at most one.
    """
    heads = _of_diagonals(index, order, row) if isinstance(index, VerticalSlashIndex) else _of_tiles(index, order, row)
    # By the rank of the rows and that of the keys: whole numbers below 2^53, which fp64 has exactly.
    found = torch.stack(heads).cpu().numpy()
    ranks = np.arange(order.world)
    return np.stack([found[:, ranks, (ranks - stage) % order.world] for stage in ranks], -1).astype(np.int64)


def _of_diagonals(index: VerticalSlashIndex, order: Order, row: int) -> list[Tensor]:
    holds, block, blocks = _holds(order, index.block, index.device), index.block, index.diagonals.shape[2]
    found = []
    for diagonals, columns in zip(index.diagonals[row], index.columns[row]):
        selected = torch.fft.rfft(diagonals.double(), 2 * blocks).conj()
        of_block = torch.bincount(columns[columns < index.length] // block, minlength=blocks)
        pairs = [_pairs(ranks, selected, of_block, block) @ holds.T for ranks in holds.split(_RANKS)]
        found.append(torch.cat(pairs))
    return found


def _pairs(holds: Tensor, selected: Tensor, of_block: Tensor, block: int) -> Tensor:
    """`[ranks, key blocks]`: the pairs of some ranks' rows and a block's keys, of the transform of a head's diagonals
    and the number of columns in each block.
    """
    blocks = holds.shape[1]
    # With how many of its row blocks a rank computes a block's tile: a correlation of whole numbers, which rounding
    # makes whole again. And how many of them are at or behind it.
    tiles = torch.fft.irfft(torch.fft.rfft(holds, 2 * blocks) * selected, 2 * blocks)[:, :blocks].round()
    behind = holds.flip(1).cumsum(1).flip(1)
    return block**2 * tiles + block * (behind - tiles) * of_block


def _of_tiles(index: Index, order: Order, row: int) -> list[Tensor]:
    """Of an index without columns, by its tiles."""
    holds = _holds(order, index.block, index.device)
    positions = np.arange(holds.shape[1] * index.block)
    places = Places.of(positions, positions, index.block, index.device)
    found = []
    for head in range(index.heads):
        tiles = index.at(places, (head, head + 1)).tiles[row, 0].tril().double()
        found.append(index.block**2 * (holds @ tiles @ holds.T))
    return found


def _holds(order: Order, block: int, device: torch.device) -> Tensor:
    """fp64 `[world, blocks]`: 1 where a block is a rank's."""
    owner = torch.from_numpy(_owners(order, block)).to(device)
    return (owner == torch.arange(order.world, device=device)[:, None]).double()


@lru_cache(4)
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
