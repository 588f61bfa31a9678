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
    of_heads = (
        _of_diagonals(index, order, row) if isinstance(index, VerticalSlashIndex) else _of_tiles(index, order, row)
    )
    found = of_heads.cpu().numpy()
    ranks = np.arange(order.world)
    return np.stack([found[:, ranks, (ranks - stage) % order.world] for stage in ranks], -1).astype(np.int64)


def _of_diagonals(index: VerticalSlashIndex, order: Order, row: int) -> Tensor:
    """fp64 `[query heads, world, world]`: pairs by the rank of rows and that of keys, below 2^53 and so exact."""
    holds, block, blocks = _holds(order, index.block, index.device), index.block, index.diagonals.shape[2]
    selected = torch.fft.rfft(index.diagonals[row].double(), 2 * blocks).conj()
    columns = [torch.bincount(x[x < index.length] // block, minlength=blocks) for x in index.columns[row]]
    found = []
    for ranks in holds.split(_RANKS):
        transform, behind = torch.fft.rfft(ranks, 2 * blocks), ranks.flip(1).cumsum(1).flip(1)
        by_head = []
        for diagonals, of_block in zip(selected, columns):
            # [ranks, key blocks]: with how many of its row blocks a rank computes a block's tile. A correlation of
            # whole numbers, which rounding makes whole again. Columns count for the others at or behind the block.
            tiles = torch.fft.irfft(transform * diagonals, 2 * blocks)[:, :blocks].round()
            by_head.append((block**2 * tiles + block * (behind - tiles) * of_block) @ holds.T)
        found.append(torch.stack(by_head))
    return torch.cat(found, 1)


def _of_tiles(index: Index, order: Order, row: int) -> Tensor:
    """Likewise of an index without columns, by its tiles."""
    holds = _holds(order, index.block, index.device)
    positions = np.arange(holds.shape[1] * index.block)
    places = Places.of(positions, positions, index.block, index.device)
    found = []
    for head in range(index.heads):
        tiles = index.at(places, (head, head + 1)).tiles[row, 0].tril().double()
        found.append(index.block**2 * (holds @ tiles @ holds.T))
    return torch.stack(found)


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
