"""`attend` and `attend_backward`: the two calls through which everything reaches a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels import reference
from farspan.kernels.masks import IntervalMask
from farspan.kernels.merge import accumulation_dtype, merge_into

BACKENDS = ("auto", "reference")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    index: None = None,
    scale: float | None = None,
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
    accumulate: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked attention on one device.

    Args:
        q: `[B, S, H, D]`. k: `[B, N, Hkv, D]`. v: `[B, N, Hkv, Dv]`; query head h reads kv head `h // (H // Hkv)`.
        mask: rows are the S rows of q, keys the N slots of k.
        index: dynamic sparse selections; no backend takes one yet (ValueError).
        scale: of the scores; `D ** -0.5` when None.
        backend: one of `BACKENDS`; "auto" is the fastest that can express the call.
        out_dtype: of out; q's when None. lse always has the accumulation dtype (fp32, or fp64 for fp64).
        accumulate: (out, lse) of the same rows over other keys, which this call's result is merged into in place.

    Returns:
        out `[B, S, H, Dv]` and lse `[B, H, S]`; a row that sees no key has out 0 and lse -inf.
    """
    _check(q, k, v, mask, index, backend)
    out, lse = reference.attend(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    if accumulate is None:
        return out.to(q.dtype if out_dtype is None else out_dtype), lse
    merge_into(*accumulate, out, lse)
    return accumulate


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    mask: IntervalMask,
    *,
    index: None = None,
    scale: float | None = None,
    backend: str = "auto",
    delta: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """This call's share of the gradients of attention over a larger set of keys.

    `out` `[B, S, H, Dv]` and `lse` `[B, H, S]` are the GLOBAL ones, merged over all keys. `out` may be None when
    `delta = rowsum(dout * out)` `[B, H, S]` is given. Of `accumulate` (dq, dk, dv) each tensor that is given is added
    into in place and returned; the other gradients are new, in `out_dtype` or the dtype of q. Other arguments as in
    `attend`.

    Returns:
        dq `[B, S, H, D]`, dk `[B, N, Hkv, D]`, dv `[B, N, Hkv, Dv]`.
    """
    _check(q, k, v, mask, index, backend)
    if delta is None:
        if out is None:
            raise ValueError("attend_backward needs the global out or delta = rowsum(dout * out); both are None")
        delta = row_delta(dout, out)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gradients = reference.attend_backward(dout, q, k, v, lse, delta, mask, scale)
    dtype = q.dtype if out_dtype is None else out_dtype
    dq, dk, dv = (
        gradient.to(dtype) if total is None else total.add_(gradient)
        for total, gradient in zip(accumulate, gradients, strict=True)
    )
    return dq, dk, dv


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """`rowsum(dout * out)` `[B, H, S]` in the accumulation dtype: what the softmax's gradient subtracts."""
    work = accumulation_dtype(dout.dtype)
    return (dout.to(work) * out.to(work)).sum(-1).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, index: None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention.backend is {backend!r}; possible are {', '.join(BACKENDS)}")
    if index is not None:
        raise ValueError("a sparse index was given, but none of the backends takes one")
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
