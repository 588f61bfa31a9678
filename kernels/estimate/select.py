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


def shortest(candidates: Tensor, target: Tensor, most: int, nowhere: int) -> Tensor:
    """Places int32 `[..., most]` of the strongest of `candidates` (`ranked`, `[..., n]`) that reach `target` `[...]`.

    The one that crosses the target is among them. `nowhere` where fewer are needed.
    """
    strongest = candidates.topk(most, dim=-1).values
    masses = strongest >> PLACE_BITS
    before = masses.cumsum(-1) - masses
    needed = (before < target[..., None]) & (masses > 0)
    return torch.where(needed, _LAST - (strongest & _LAST), nowhere).int()


def share(total: Tensor, mass: float) -> Tensor:
    """The least integer that is at least `mass` of a total below 2 ** 46; mass counts in 1 / 65536."""
    numerator = round(mass * (1 << _SHARE_BITS))
    return (total * numerator + (1 << _SHARE_BITS) - 1) >> _SHARE_BITS
