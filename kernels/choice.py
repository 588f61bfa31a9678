"""Which backend computes what of a mask: parts, each one call of one backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from farspan.kernels import rates
from farspan.kernels.backends import BACKENDS, REGISTRY
from farspan.kernels.masks import IntervalMask
from farspan.kernels.rectangles import Rectangle, rectangles
from farspan.kernels.tiles import TileMap

# A mask that takes more calls of a library than this is not one for a library.
_MOST_CALLS = 64


@dataclass(frozen=True, eq=False)
class Part:
    """One call: the rows and keys that it takes, and the mask between them."""

    backend: str
    rows: slice
    keys: slice
    mask: IntervalMask

    def __str__(self) -> str:
        rows, keys = self.rows, self.keys
        kind = {"general": "tiles"}.get(self.mask.kind(keys.stop - keys.start), self.mask.kind(keys.stop - keys.start))
        return f"{self.backend}: {kind}, rows {rows.start}-{rows.stop}, keys {keys.start}-{keys.stop}"


def parts(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, backend: str, backward: bool) -> list[Part]:
    """The calls that make up one attention; worked out once a mask, then remembered by it.

    ValueError, naming the key to change, when the backend cannot compute them.
    """
    name = f"parts {q.shape[2:]} {k.shape[1:]} {v.shape[3]} {q.dtype} {backend} {backward}"
    if name not in mask.derived:
        mask.derived[name] = _parts(q, k, v, mask, backend, backward)
    found: list[Part] = mask.derived[name]
    return found


def _parts(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, backend: str, backward: bool) -> list[Part]:
    if backend == "auto":
        return _fastest(q, k, v, mask, backward)
    if backend not in BACKENDS:
        raise ValueError(f"attention.backend is {backend!r}; possible are {', '.join(BACKENDS)}")
    refusal = REGISTRY[backend].refusal(q, k, v)
    if refusal is not None:
        raise ValueError(f"attention.backend is {backend!r}, but {refusal}; set it to auto")
    if REGISTRY[backend].any_mask:
        return [_whole(mask, k, backend)]
    cut = rectangles(mask, k.shape[1], smallest=1, most=_MOST_CALLS)
    if cut.rest is not None:
        raise ValueError(
            f"attention.backend is {backend!r}, which computes full and causal rectangles, and this mask is not "
            f"{_MOST_CALLS} or fewer of them; set it to auto or triton"
        )
    return [_rectangle(part, mask, backend) for part in cut.rectangles]


def _fastest(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, backward: bool) -> list[Part]:
    """The whole mask by the fastest backend that takes any, or its rectangles by libraries, whichever is less time."""
    able = [name for name, backend in REGISTRY.items() if backend.refusal(q, k, v) is None]
    if q.device.type != "cuda" or "triton" not in able:
        return [_whole(mask, k, "reference")]
    table = rates.of_device(q.device)
    heads, dim = q.shape[2], q.shape[3]

    def seconds(backend: str, causal: bool, rows: int, keys: int, pairs: int) -> float:
        return table.seconds(backend, causal, backward, rows, keys, pairs, heads, dim)

    tiles = TileMap.of(mask, k.shape[1])
    whole = seconds("triton", tiles.offset != k.shape[1], mask.rows, k.shape[1], tiles.pairs)
    cut = rectangles(mask, k.shape[1])
    pieces, total = [], 0.0
    for part in cut.rectangles:
        rows, keys = part.rows[1] - part.rows[0], part.keys[1] - part.keys[0]
        cost = {name: seconds(name, part.causal, rows, keys, part.pairs) for name in able if name in table.backends}
        best = min(cost, key=lambda name: cost[name])
        pieces.append(_rectangle(part, mask, best))
        total += cost[best]
    if cut.rest is not None:
        pieces.append(_whole(cut.rest, k, "triton"))
        total += seconds("triton", True, mask.rows, k.shape[1], TileMap.of(cut.rest, k.shape[1]).pairs)
    return pieces if pieces and total < whole else [_whole(mask, k, "triton")]


def _whole(mask: IntervalMask, k: Tensor, backend: str) -> Part:
    return Part(backend, slice(0, mask.rows), slice(0, k.shape[1]), mask)


def _rectangle(part: Rectangle, mask: IntervalMask, backend: str) -> Part:
    return Part(backend, slice(*part.rows), slice(*part.keys), part.mask(mask.device))
