"""Choosing: the shortest run of the strongest that reaches a target, equal ones by place, all in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.estimate.units import PLACE_BITS

_LAST = (1 << PLACE_BITS) - 1
_SHARE_BITS = 16


def ranked(masses: Tensor, places: Tensor) -> Tensor:
    """Masses below 2 ** 38 and their places as single int64 numbers: no two equal, the stronger and earlier greater."""
    return (masses << PLACE_BITS) | (_LAST - places)


def strongest(candidates: Tensor, most: int) -> Tensor:
    """The greatest `most` of `candidates` (`ranked`, `[..., n]`), or all where these are fewer, in descending order."""
    return candidates.topk(min(most, candidates.shape[-1]), dim=-1).values


def shortest(strongest: Tensor, target: Tensor, nowhere: int) -> Tensor:
    """Places int32 `[..., n]` of those of `strongest` `[..., n]` that reach `target` `[...]` together.

    The one that crosses the target is among them. `nowhere` where fewer are needed.
    """
    masses = strongest >> PLACE_BITS
    before = masses.cumsum(-1) - masses
    needed = (before < target[..., None]) & (masses > 0)
    return torch.where(needed, _LAST - (strongest & _LAST), nowhere).int()


def share(total: Tensor, mass: float) -> Tensor:
    """The least integer that is at least `mass` of a total below 2 ** 46; mass counts in 1 / 65536."""
    numerator = round(mass * (1 << _SHARE_BITS))
    return (total * numerator + (1 << _SHARE_BITS) - 1) >> _SHARE_BITS
