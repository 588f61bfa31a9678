"""Orders: which rank holds which tokens of a packed row, in which slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """The permutation of a packed row over ranks.

    `positions[rank]` int64 `[slots]` ascends: which token each slot of the rank holds. Positions at or past `length`
    are padding, which no mask and no loss sees. All ranks hold equally many slots. `roaming`, boolean `[length]`, marks
    rows whose queries may travel to the keys that they see (`two_class`).
    """

    name: str
    length: int
    positions: tuple[np.ndarray, ...]
    roaming: np.ndarray | None = None

    @property
    def world(self) -> int:
        return len(self.positions)

    @property
    def slots(self) -> int:
        return len(self.positions[0])

    def real(self, rank: int) -> np.ndarray:
        """Boolean `[slots]`: which slots of the rank hold a token, not padding."""
        return self.positions[rank] < self.length

    def roams(self, rank: int) -> np.ndarray:
        """Boolean `[slots]`: which rows of the rank are marked as roaming; padding is not."""
        positions = self.positions[rank]
        if self.roaming is None:
            return np.zeros(len(positions), bool)
        return (positions < self.length) & self.roaming[np.minimum(positions, self.length - 1)]

    def shard(self, x: Tensor, rank: int, dim: int = 1, padding: float = 0) -> Tensor:
        """The rank's slots of a whole row `x` (size `length` along `dim`); padding slots are filled with `padding`."""
        positions = torch.from_numpy(self.positions[rank]).to(x.device)
        taken = x.index_select(dim, positions.clamp(max=self.length - 1))
        shape = [1] * x.dim()
        shape[dim] = -1
        return torch.where(
            (positions < self.length).view(shape), taken, torch.full((), padding, dtype=x.dtype, device=x.device)
        )

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole row again, from what each rank holds: `unshard([shard(x, r) for r in ranks]) == x`."""
        shape = list(parts[0].shape)
        shape[dim] = self.length
        whole = parts[0].new_zeros(shape)
        for rank, part in enumerate(parts):
            slots = torch.from_numpy(self.real(rank).nonzero()[0]).to(part.device)
            positions = torch.from_numpy(self.positions[rank][self.real(rank)]).to(part.device)
            whole.index_copy_(dim, positions, part.index_select(dim, slots))
        return whole

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The rank's slots as one span, or as two where they hold two runs of consecutive positions (zigzag).

        Each span becomes a block that travels and is computed by itself; a finer order stays whole.
        """
        cuts = np.flatnonzero(np.diff(self.positions[rank]) != 1) + 1
        edges = [0, int(cuts[0]), self.slots] if len(cuts) == 1 else [0, self.slots]
        return list(pairwise(edges))


def contiguous(length: int, world: int) -> Order:
    """Rank r holds the r-th share of consecutive tokens. Causal work is unbalanced: the last rank has the most.

    8 tokens, 2 ranks:  0 0 0 0 1 1 1 1
    """
    share = _ceil(length, world)
    return _order("contiguous", length, [[(rank * share, share)] for rank in range(world)])


def zigzag(length: int, world: int) -> Order:
    """2 x world chunks; rank r holds chunk r and chunk 2 x world - 1 - r, so that causal work is equal.

        8 tokens, 2 ranks:  0 0 1 1 1 1 0 0

    Source: the zigzag variant of ring attention in zhuzilin/ring-flash-attention (2024).
    """
    chunk = _ceil(length, 2 * world)
    return _order("zigzag", length, [[(r * chunk, chunk), ((2 * world - 1 - r) * chunk, chunk)] for r in range(world)])


def striped(length: int, world: int, block: int = 1) -> Order:
    """Blocks of `block` tokens dealt out to the ranks in turn.

        8 tokens, 2 ranks, block 2:  0 0 1 1 0 0 1 1

    Source: Striped Attention (arXiv:2311.09431), with blocks in place of single tokens.
    """
    if block < 1:
        raise ValueError(f"a stripe has at least one token, got parallel.stripe = {block}")
    stripes = _ceil(length, world * block)
    return _order(
        "striped", length, [[((j * world + rank) * block, block) for j in range(stripes)] for rank in range(world)]
    )


def zigzag_documents(cu_seqlens: Sequence[int], world: int) -> Order:
    """Zigzag of each document by itself, as Megatron and Transformer Engine cut their packed format `thd`.

        documents of 4 and 8 tokens, 2 ranks:  0 1 1 0 0 0 1 1 1 1 0 0

    `cu_seqlens` are cumulative lengths from 0 to the row's length; each document must have a multiple of 2 x `world`
    tokens (ValueError).
    """
    bounds = np.asarray(cu_seqlens, np.int64)
    sizes = np.diff(bounds)
    uneven = sizes[sizes % (2 * world) != 0]
    if len(uneven):
        raise ValueError(
            f"a document of {uneven[0]} tokens cannot be cut into 2 x {world} equal chunks: pad each document to a "
            f"multiple of {2 * world}"
        )
    offset = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
    chunk = offset // np.repeat(sizes // (2 * world), sizes)
    rank = np.minimum(chunk, 2 * world - 1 - chunk)
    return Order("zigzag_documents", int(bounds[-1]), tuple(np.flatnonzero(rank == r) for r in range(world)))


def two_class(roaming: np.ndarray, world: int, align: int = 1) -> Order:
    """For Star Attention: the context in contiguous shares, and the `roaming` rows, which see all, in equal ones.

        12 tokens of which the last 4 roam, 2 ranks:  0 0 0 0 1 1 1 1 0 0 1 1

    `roaming` is boolean `[length]`. Shares of the context are cut at multiples of `align` tokens of it, such as Star's
    blocks, as long as every rank gets some.
    """
    context, rows = np.flatnonzero(~roaming), np.flatnonzero(roaming)
    align = align if len(context) >= align * world else 1
    cuts = [round(rank * len(context) / (world * align)) * align for rank in range(1, world)]
    held = [np.sort(np.concatenate(parts)) for parts in zip(np.split(context, cuts), np.array_split(rows, world))]
    slots, padding = max(len(positions) for positions in held), len(roaming)
    whole = []
    for positions in held:
        missing = slots - len(positions)
        whole.append(np.concatenate([positions, np.arange(padding, padding + missing)]))
        padding += missing
    return Order("two_class", len(roaming), tuple(whole), roaming)


def build(name: str, length: int, world: int, stripe: int = 128) -> Order:
    """The order called `name` in the configuration (`ORDERS`)."""
    if name not in ORDERS:
        raise ValueError(f"parallel.order is {name!r}; possible are {', '.join(ORDERS)}")
    if name == "striped":
        # A row shorter than one stripe a rank would leave ranks without tokens.
        return striped(length, world, min(stripe, _ceil(length, world)))
    return ORDERS[name](length, world)


ORDERS: dict[str, Callable[..., Order]] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def _order(name: str, length: int, runs: list[list[tuple[int, int]]]) -> Order:
    if length < 1:
        raise ValueError(f"an order needs at least one token, got length {length}")
    return Order(name, length, tuple(np.concatenate([np.arange(a, a + n) for a, n in rank]) for rank in runs))


def _ceil(length: int, parts: int) -> int:
    return -(-length // parts)
