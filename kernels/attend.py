"""`attend` and `attend_backward`: the two calls through which everything reaches a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.backends import REGISTRY
from farspan.kernels.backends.base import BackwardCall, ForwardCall
from farspan.kernels.choice import Part, choose
from farspan.kernels.index import Selection
from farspan.kernels.masks import IntervalMask
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.problem import Problem
from farspan.kernels.triton import rows as row_kernels

Gradients = tuple[Tensor, Tensor, Tensor]
Totals = tuple[Tensor | None, Tensor | None, Tensor | None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    index: Selection | None = None,
    scale: float | None = None,
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
    accumulate: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked attention on one device.

    Args:
        q: `[B, S, H, D]`. k: `[B, N, Hkv, D]`. v: `[B, N, Hkv, Dv]`; query head h reads kv head `h // (H // Hkv)`.
        mask: rows are the S rows of q, keys the N slots of k.
        index: what is computed of that which the mask shows; all of it when None. Libraries take none (ValueError).
        scale: of the scores; `D ** -0.5` when None.
        backend: one of `BACKENDS`; "auto" is the fastest that can express the call, by the measured table of `rates`,
            and may give rectangles of the mask to a library and the rest to another backend.
        out_dtype: of out; q's when None. lse always has the accumulation dtype (fp32, or fp64 for fp64).
        accumulate: (out, lse) of the same rows over other keys, which this call's result is merged into in place.

    Returns:
        out `[B, S, H, Dv]` and lse `[B, H, S]`; a row that sees no key has out 0 and lse -inf.
    """
    _check(q, k, v, mask, index)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype if out_dtype is None else out_dtype
    problem = Problem.of(q, k, v, accumulate=accumulate is not None, index_block=index.block if index else None)
    choice = choose(problem, mask, backend)

    def run(part: Part, dtype: torch.dtype, total: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        rows, keys, values = q[:, part.rows], k[:, part.keys], v[:, part.keys]
        return REGISTRY[part.backend].attend(ForwardCall(rows, keys, values, part.mask, index, scale, dtype, total))

    first, *others = choice.parts
    spans_all = first.rows == slice(0, q.shape[1])
    if spans_all and not others:
        return run(first, dtype, accumulate)
    if choice.apart and accumulate is None:
        out, lse = run(first, dtype, None) if spans_all else _nothing(q, v, dtype)
        for part in others if spans_all else choice.parts:
            out[:, part.rows], lse[:, :, part.rows] = run(part, dtype, None)
        return out, lse
    out, lse = _nothing(q, v, accumulation_dtype(q.dtype)) if accumulate is None else accumulate
    for part in choice.parts:
        run(part, out.dtype, (out[:, part.rows], lse[:, :, part.rows]))
    return out.to(dtype) if accumulate is None else out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    mask: IntervalMask,
    *,
    index: Selection | None = None,
    scale: float | None = None,
    backend: str = "auto",
    delta: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: Totals = (None, None, None),
) -> Gradients:
    """This call's share of the gradients of attention over a larger set of keys.

    `out` `[B, S, H, Dv]` and `lse` `[B, H, S]` are the GLOBAL ones, merged over all keys. `out` may be None when
    `delta = rowsum(dout * out)` `[B, H, S]` is given. Of `accumulate` (dq, dk, dv) each tensor that is given is added
    into in place and returned; the other gradients are new, in `out_dtype` or the dtype of q. Other arguments as in
    `attend`.

    Returns:
        dq `[B, S, H, D]`, dk `[B, N, Hkv, D]`, dv `[B, N, Hkv, Dv]`.
    """
    _check(q, k, v, mask, index)
    if delta is None:
        if out is None:
            raise ValueError("attend_backward needs the global out or delta = rowsum(dout * out); both are None")
        delta = row_delta(dout, out)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype if out_dtype is None else out_dtype
    accumulates = any(total is not None for total in accumulate)
    block = index.block if index else None
    problem = Problem.of(q, k, v, backward=True, accumulate=accumulates, out_given=out is not None, index_block=block)
    choice = choose(problem, mask, backend)

    def run(part: Part, dtype: torch.dtype, totals: Totals) -> Gradients:
        rows, keys = part.rows, part.keys
        call = BackwardCall(
            dout[:, rows],
            q[:, rows],
            k[:, keys],
            v[:, keys],
            None if out is None else out[:, rows],
            lse[:, :, rows],
            delta[:, :, rows],
            part.mask,
            index,
            scale,
            dtype,
            totals,
        )
        return REGISTRY[part.backend].attend_backward(call)

    first, *others = choice.parts
    spans_all = first.rows == slice(0, q.shape[1]) and first.keys == slice(0, k.shape[1])
    if spans_all and not others:
        return run(first, dtype, accumulate)
    if choice.apart and not accumulates:
        dq, dk, dv = run(first, dtype, (None, None, None)) if spans_all else _zeros((q, k, v), dtype)
        for part in others if spans_all else choice.parts:
            dq[:, part.rows], dk[:, part.keys], dv[:, part.keys] = run(part, dtype, (None, None, None))
        return dq, dk, dv
    work = accumulation_dtype(q.dtype)
    made = _zeros((q, k, v), work)
    totals = [new if total is None else total for new, total in zip(made, accumulate, strict=True)]
    for part in choice.parts:
        run(part, work, (totals[0][:, part.rows], totals[1][:, part.keys], totals[2][:, part.keys]))
    dq, dk, dv = (sum_.to(dtype) if total is None else total for sum_, total in zip(totals, accumulate, strict=True))
    return dq, dk, dv


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """`rowsum(dout * out)` `[B, H, S]` in the accumulation dtype: what the softmax's gradient subtracts."""
    work = accumulation_dtype(dout.dtype)
    if dout.device.type == "cuda" and work == torch.float32:
        return row_kernels.row_delta(dout, out)
    return (dout.to(work) * out.to(work)).sum(-1).transpose(1, 2)


def _nothing(q: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse of rows that have seen no key."""
    batch, rows, heads, _ = q.shape
    out = q.new_zeros(batch, rows, heads, v.shape[3], dtype=dtype)
    return out, q.new_full((batch, heads, rows), float("-inf"), dtype=accumulation_dtype(q.dtype))


def _zeros(tensors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Gradients:
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in tensors)
    return dq, dk, dv


def _check(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, index: Selection | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v must be [B, S, H, D], [B, N, Hkv, D], [B, N, Hkv, Dv]; got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch, and H must be a multiple of Hkv"
        )
    if mask.rows != q.shape[1] or mask.batch not in (1, q.shape[0]):
        raise ValueError(f"a mask of {mask.batch} x {mask.rows} rows does not fit q {tuple(q.shape)}")
    if index is not None:
        tiles = tuple(-(-length // index.block) for length in (q.shape[1], k.shape[1]))
        if index.shape[1:] != (q.shape[2], *tiles) or index.shape[0] not in (1, q.shape[0]):
            raise ValueError(
                f"an index of {index.shape} tiles does not fit q {tuple(q.shape)} and k {tuple(k.shape)}: "
                f"it must be [B, {q.shape[2]}, {tiles[0]}, {tiles[1]}]"
            )
