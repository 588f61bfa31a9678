"""MTraining's online estimation of a vertical-slash index (arXiv:2510.18830), in integers where sums decide.

A few rows, the probes, attend to all keys. Columns that they attend to are chosen by mass, then diagonals of blocks by
the mass that is left, until `mass` of all is computed. The keys may be spread over several holders: each calls
`vertical_slash` with its own, and the result is the same, bit for bit, however many they are and whatever each holds,
on devices of one kind.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from farspan.kernels.estimate import reference
from farspan.kernels.estimate.probes import Probes
from farspan.kernels.estimate.select import ranked, share, shortest, strongest
from farspan.kernels.estimate.settings import VerticalSlash
from farspan.kernels.estimate.units import PLACE_BITS, SUM_BITS, WEIGHT_BITS, mass_bits
from farspan.kernels.index import VerticalSlashIndex, slots_of
from farspan.kernels.tiles import TILE
from farspan.kernels.triton.estimate import launch

_ALL = 1 << 62  # more than any mass


class Budgets(NamedTuple):
    """Fixed numbers of columns and of diagonals, int64 `[H]` on the keys' device, besides what is always computed."""

    columns: Tensor
    diagonals: Tensor


class Holders(Protocol):
    """Those who hold the keys of a row together; each calls the same methods in the same order."""

    def highest(self, x: Tensor) -> Tensor:
        """The elementwise maximum of what each gives, int32."""

    def total(self, x: Tensor) -> Tensor:
        """The elementwise sum of what each gives, int64."""

    def choose(self, candidates: Tensor, target: Tensor, most: int, nowhere: int) -> Tensor:
        """`shortest` of the `most` strongest of all: each gives its own `[lines, n]`, and the same target `[lines]`."""


class Alone:
    """One device holds all keys."""

    def highest(self, x: Tensor) -> Tensor:
        return x

    def total(self, x: Tensor) -> Tensor:
        return x

    def choose(self, candidates: Tensor, target: Tensor, most: int, nowhere: int) -> Tensor:
        return shortest(candidates[:, :most], target, nowhere)


@torch.no_grad()
def vertical_slash(
    q: Tensor,
    k: Tensor,
    k_positions: Tensor,
    probes: Probes,
    settings: VerticalSlash,
    holders: Holders | None = None,
    scale: float | None = None,
    budgets: Budgets | None = None,
) -> tuple[VerticalSlashIndex, Tensor]:
    """The index of every query head, from the probes' queries and the keys that are here.

    Args:
        q: `[B, H, probes, D]`, the same for all holders. k: `[B, N, Hkv, D]`; head h reads kv head `h // (H // Hkv)`.
        k_positions: int64 `[N]` on the keys' device; those at or past `probes.length` are padding.
        holders: of the keys; this device alone when None.
        scale: of the scores; `D ** -0.5` when None.
        budgets: take the place of `settings.mass`: each head takes the strongest, so many, within `settings`' caps.

    Returns:
        the index, and what share of the probes' attention it computes: fp64 `[B, H]`, 1 where they see nothing.

    Nothing here waits for a GPU. What is chosen never depends on keys after a probe.
    """
    _check(q, k, probes)
    holders = holders or Alone()
    length, bits = probes.length, mass_bits(probes.rows)
    passes: ModuleType = launch if k.device.type == "cuda" else reference
    given = (q.contiguous(), k, probes, q.shape[-1] ** -0.5 if scale is None else scale)

    exponents, weights = passes.row_weights(*given)
    lse = _denominators(exponents, weights, holders)
    candidates, sums = passes.column_scores(*given, lse, bits, settings)
    always, in_all, in_columns = holders.total(sums).unbind(-1)
    wanted = share(in_all, settings.mass if budgets is None else 1.0)
    # Columns take what `mass` of them has, at most what is wanted of all; a score is never above a column's mass.
    target = torch.minimum(share(in_columns, settings.mass), wanted - always)
    if budgets is not None:
        target = torch.full_like(target, _ALL)
    columns = _columns(candidates, target, settings.most_columns, length, holders)
    columns = _first(columns, None if budgets is None else budgets.columns, length)
    chosen = _at_slots(columns, k_positions)
    left = passes.diagonal_masses(*given, lse, bits, settings, chosen)
    left = holders.total(_by_distance(left, probes))
    remaining = left.sum(-1)
    needed = wanted - (in_all - remaining)
    diagonals = _diagonals(left, needed, settings, None if budgets is None else budgets.diagonals)
    index = VerticalSlashIndex(diagonals, _with_sinks(columns, settings.sinks, length), length)
    covered = in_all - torch.where(diagonals, 0, left).sum(-1)
    return index, torch.where(in_all > 0, covered / in_all.clamp(min=1).double(), 1.0)


def _denominators(exponents: Tensor, sums: Tensor, holders: Holders) -> Tensor:
    """fp32 `[B, H, probes]`: each row's log-sum of exponentials to base 2; 0 where it sees nothing."""
    highest = holders.highest(exponents.amax(2))
    below = (highest[:, :, None] - exponents).clamp(max=62)
    total = holders.total(((sums.long() << SUM_BITS) >> below).sum(2))
    log = highest + total.double().log2() - (WEIGHT_BITS + SUM_BITS)
    return torch.where(total > 0, log, 0.0).float()


def _columns(candidates: Tensor, target: Tensor, most: int, length: int, holders: Holders) -> Tensor:
    """Positions int32 `[B, H, most]` of the chosen columns, the strongest first; `length` where there are fewer."""
    # The strongest of all holders are among the strongest of each.
    own = strongest(candidates.flatten(0, 1), most)
    return holders.choose(own, target.flatten(), min(most, length), length).unflatten(0, target.shape)


def _at_slots(columns: Tensor, k_positions: Tensor) -> Tensor:
    """Bool `[B, H, N]`: which keys that are here are among the columns."""
    keys = len(k_positions)
    chosen = columns.new_zeros(*columns.shape[:2], keys + 1, dtype=torch.bool)
    return chosen.scatter_(2, slots_of(columns, k_positions), True)[..., :keys]


def _by_distance(left: Tensor, probes: Probes) -> Tensor:
    """Masses by the distance of their blocks, int64 `[B, H, blocks]`, of int64 `[B, H, sets, 2, key tiles]`."""
    blocks = -(-probes.length // TILE)
    rows = torch.stack([probes.first_block, probes.first_block + 1], -1)
    # A tile after the rows has no mass, wherever it is counted.
    distance = (rows[..., None] - probes.k_blocks).clamp(0, blocks - 1).long()
    at = distance[:, None].expand_as(left).flatten(2)
    return left.new_zeros(*left.shape[:2], blocks).scatter_add_(2, at, left.flatten(2))


def _first(chosen: Tensor, count: Tensor | None, nowhere: int) -> Tensor:
    """Of each head's choices `[B, H, most]`, the strongest first, as many as it may have."""
    if count is None:
        return chosen
    place = torch.arange(chosen.shape[2], device=chosen.device)
    return torch.where(place < count[:, None], chosen, nowhere)


def _diagonals(left: Tensor, needed: Tensor, settings: VerticalSlash, count: Tensor | None) -> Tensor:
    """Bool `[B, H, blocks]`: the local diagonals, and the strongest others that make up what is needed."""
    blocks = left.shape[2]
    distance = torch.arange(blocks, device=left.device)
    chosen = shortest(strongest(ranked(left, distance), settings.most_diagonals), needed, blocks)
    chosen = _first(chosen, count, blocks)
    selected = left.new_zeros(*left.shape[:2], blocks + 1, dtype=torch.bool)
    selected.scatter_(2, chosen.long(), True)
    return selected[..., :blocks] | (distance < settings.local_blocks)


def _with_sinks(columns: Tensor, sinks: int, length: int) -> Tensor:
    """All columns ascending; the sinks have no mass left, so none is there already."""
    first = torch.arange(min(sinks, length), device=columns.device, dtype=columns.dtype)
    return torch.cat([first.expand(*columns.shape[:2], -1), columns], -1).sort(-1).values


def _check(q: Tensor, k: Tensor, probes: Probes) -> None:
    if q.shape[2] != probes.rows or k.shape[1] != probes.keys or q.shape[1] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"probes q must be [B, H, {probes.rows}, D] and k [B, {probes.keys}, Hkv, D] with H a multiple of Hkv; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if probes.length >= 1 << PLACE_BITS:
        raise ValueError(f"an index is estimated for rows below {1 << PLACE_BITS:,} tokens, got {probes.length:,}")
