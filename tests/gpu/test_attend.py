"""Attention kernels on a GPU, in bf16: errors beside cuDNN's on the same inputs, repeatability, merging, size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from farspan.kernels import IntervalMask, attend, attend_backward, masks, row_delta
from farspan.kernels.backends import REGISTRY
from farspan.kernels.problem import Problem
from farspan.kernels.tiles import TileMap
from farspan.kernels.triton.hopper import launch as hopper

pytestmark = pytest.mark.gpu

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    length: int, heads: tuple[int, int], dim: int, keys: int | None = None, batch: int = 1
) -> tuple[Tensor, ...]:
    """q, k, v, dout in bf16; as many keys as rows unless told."""
    generator = torch.Generator("cuda").manual_seed(length)
    lengths = (length, keys or length, keys or length, length)
    shapes = [(batch, n, h, dim) for n, h in zip(lengths, (heads[0], heads[1], heads[1], heads[0]), strict=True)]
    return tuple(torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)


def run(tensors: tuple[Tensor, ...], mask: IntervalMask, backend: str) -> Results:
    q, k, v, dout = tensors
    out, lse = attend(q, k, v, mask, backend=backend)
    return out, lse, *attend_backward(dout, q, k, v, out, lse, mask, backend=backend)


def builders(length: int) -> dict[str, IntervalMask]:
    """A mask of each builder, over documents of odd lengths, and one in which every third row sees nothing."""
    cu = [0, 1, 300, 301, length // 2 + 77, length]
    sizes = [b - a for a, b in pairwise(cu)]
    sees = torch.arange(length) % 3 != 1
    return {
        "causal": masks.causal(length),
        "full": masks.full(length),
        "documents": masks.causal(length, cu),
        "window": masks.sliding_window(length, 333, 4, cu),
        "star": masks.star(length, 256, 100, [size * 7 // 8 for size in sizes], cu),
        "prefix": masks.prefix_lm(length, [size // 3 for size in sizes], cu),
        "question": masks.shared_question(length, [[size - 2 * (size // 3), size // 3, size // 3] for size in sizes]),
        "blind": IntervalMask(*(bound * sees for bound in masks.causal(length).bounds)),
    }


def errors(results: Results, exact: Results) -> list[float]:
    """Relative L2 of out, dq, dk, dv."""
    for x in results:
        assert not x.isnan().any()
    pairs = [(results[i], exact[i]) for i in (0, 2, 3, 4)]
    return [float((x.double() - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs]


def skip_without(backend: str, tensors: tuple[Tensor, ...]) -> None:
    refusal = REGISTRY[backend].refusal(Problem.of(*tensors[:3]))
    if refusal is not None:
        pytest.skip(refusal)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [127, 128, 129, 4097, 131072])
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_error_is_that_of_cudnn(kind: str, length: int, dim: int) -> None:
    if kind == "full" and length > 5000:
        pytest.skip("the fp64 reference of a full 131072 x 131072 takes minutes")
    tensors = inputs(length, (4, 1), dim)
    mask = (masks.causal if kind == "causal" else masks.full)(length).to("cuda")
    exact = run(tuple(x.double() for x in tensors), mask, "reference")
    ours, library = (errors(run(tensors, mask, backend), exact) for backend in ("triton", "cudnn"))
    print(f"{kind} {length} head dim {dim}: triton {ours}, cudnn {library}")
    assert all(a <= 1.1 * b for a, b in zip(ours, library))


def test_one_token() -> None:
    tensors = inputs(1, (4, 1), 128)
    out, _, dq, dk, dv = run(tensors, masks.causal(1).to("cuda"), "triton")
    assert torch.equal(out, tensors[2].expand_as(out))
    assert dq.abs().max() < 1e-2
    assert dk.abs().max() < 1e-2
    assert torch.allclose(dv[0, 0, 0].float(), tensors[3][0, 0].float().sum(0), atol=2e-2)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", builders(1531))
def test_every_mask(name: str, dim: int) -> None:
    length = 1531
    mask = builders(length)[name].to("cuda")
    tensors = inputs(length, (8, 2), dim)
    exact = run(tuple(x.double() for x in tensors), mask, "reference")
    # cuDNN's own errors on dense inputs are 2.0e-3 to 3.0e-3.
    assert max(errors(run(tensors, mask, "triton"), exact)) < 3e-3
    half = tuple(x.half() for x in tensors)
    exact = run(tuple(x.double() for x in half), mask, "reference")
    assert max(errors(run(half, mask, "triton"), exact)) < 5e-4


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", builders(1531))
def test_portable_kernels_where_others_would_run(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "takes", lambda q, v: False)
    tensors = inputs(1531, (8, 2), dim)
    mask = builders(1531)[name].to("cuda")
    exact = run(tuple(x.double() for x in tensors), mask, "reference")
    assert max(errors(run(tensors, mask, "triton"), exact)) < 3e-3


PIECES = {  # rows and keys of a whole of 2000 tokens, as the stages of a ring see them
    "late rows": (range(400, 1000), range(1000)),
    "blind rows": (range(1000), range(400, 1000)),
    "past keys": (range(1000, 1900), range(1000)),
    "unseen keys": (range(100, 400), range(1000)),
    "nothing": (range(500), range(500, 800)),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str, lists: bool, heads: tuple[int, int], dim: int) -> None:
    """Other numbers of keys than of rows, two batch elements (with a mask each in lists), any size of group."""
    rows, keys = PIECES[name]
    whole = masks.causal(2000)
    if lists:
        whole = masks.stack([masks.sliding_window(2000, 333, 4), masks.causal(2000, [0, 301, 2000])])
    mask = whole.at(rows, keys).to("cuda")
    assert (TileMap.of(mask, len(keys)).offset is None) == (lists and name != "nothing")
    tensors = inputs(len(rows), heads, dim, len(keys), batch=2)
    results = run(tensors, mask, "triton")
    exact = run(tuple(x.double() for x in tensors), mask, "reference")
    assert max(errors(results, exact)) < 4e-3
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(results, run(tensors, mask, "triton"), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [False, True])
def test_full_rectangles_in_parts(dtype: torch.dtype, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of many rows and keys are computed; results in bf16 are not rounded between parts."""
    rows, keys = 700, 900
    q, k, v, dout = inputs(rows, (4, 2), 128, keys)
    full = torch.full((1, rows), keys, dtype=torch.int32)
    mask = IntervalMask(full * 0, full, full * 0, full * 0).to("cuda")
    out, lse = attend(q, k, v, mask, backend="triton")

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        totals = tuple(torch.ones_like(x, dtype=dtype) for x in (q, k, v)) if adds else (None, None, None)
        given = {"backend": "triton", "out_dtype": dtype, "accumulate": totals}
        return attend_backward(dout, q, k, v, out, lse, mask, **given)

    at_once = gradients()
    monkeypatch.setattr(hopper, "_MOST_ROWS", 256)
    monkeypatch.setattr(hopper, "_MOST_KEYS", 384)
    in_parts = gradients()
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    for x, y in zip(in_parts, at_once, strict=True):
        assert float((x.double() - y.double()).norm() / y.double().norm()) < bound


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "full", "window"])
def test_what_lies_past_the_last_key_has_no_weight(name: str, dim: int) -> None:
    """With scores near -180 the weight of a score of 0, which padding has, is infinite."""
    q, k, v, dout = inputs(1531, (8, 2), dim)
    tensors = (q + 4 * (128 / dim) ** 0.25, k - 4 * (128 / dim) ** 0.25, v, dout)
    mask = builders(1531)[name].to("cuda")
    exact = run(tuple(x.double() for x in tensors), mask, "reference")
    assert max(errors(run(tensors, mask, "triton"), exact)) < 0.05


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", builders(1531))
def test_repeats_bit_for_bit(name: str, dim: int) -> None:
    tensors = inputs(8192, (8, 2), dim)
    mask = builders(8192)[name].to("cuda")
    first = run(tensors, mask, "triton")
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(first, run(tensors, mask, "triton"), strict=True))


@pytest.mark.parametrize("second", ["triton", "cudnn", "flash", "flash_attn_4", "flash_attn_4_deterministic"])
@pytest.mark.parametrize("first", ["triton", "cudnn", "flash", "flash_attn_4", "flash_attn_4_deterministic"])
def test_shares_of_two_backends_are_the_whole(first: str, second: str) -> None:
    """Keys in two halves, as a ring's stages see them: a full rectangle, and a causal square with a share of rows."""
    length, cut = 4096, 2048
    tensors = inputs(length, (8, 2), 128)
    for backend in (first, second):
        skip_without(backend, tensors)
    q, k, v, dout = tensors
    whole = masks.causal(length)
    exact = run(tuple(x.double() for x in tensors), whole.to("cuda"), "reference")
    shares = [
        (backend, keys, whole.at(range(length), range(keys.start, keys.stop)).to("cuda"))
        for backend, keys in ((first, slice(0, cut)), (second, slice(cut, length)))
    ]
    total = (torch.zeros_like(q, dtype=torch.float32), torch.full((1, 8, length), float("-inf"), device="cuda"))
    for backend, keys, mask in shares:
        attend(q, k[:, keys], v[:, keys], mask, backend=backend, accumulate=total)
    out = total[0].to(q.dtype)
    sums = tuple(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for backend, keys, mask in shares:
        into = (sums[0], sums[1][:, keys], sums[2][:, keys])
        given = (dout, q, k[:, keys], v[:, keys], out, total[1], mask)
        attend_backward(*given, delta=row_delta(dout, out), backend=backend, accumulate=into)
    assert max(errors((out, total[1], *sums), exact)) < 4e-3


@pytest.mark.parametrize("name", builders(1531))
def test_auto_is_right(name: str) -> None:
    tensors = inputs(8192, (8, 2), 128)
    mask = builders(8192)[name].to("cuda")
    exact = run(tuple(x.double() for x in tensors), mask, "reference")
    assert max(errors(run(tensors, mask, "auto"), exact)) < 4e-3


def test_a_million_tokens_in_a_window() -> None:
    """One layer at 1,048,576 tokens: q alone has 2^32 elements, past what 32-bit offsets reach."""
    length, heads = 1 << 20, (32, 8)
    tensors = inputs(length, heads, 128)
    mask = masks.sliding_window(length, 4096).to("cuda")
    q, k, v, dout = tensors
    out, lse = attend(q, k, v, mask, backend="triton")
    dq, dk, dv = attend_backward(dout, q, k, v, out, lse, mask, backend="triton")
    # The last rows, whose offsets are the largest, against fp64 on the keys that they see.
    rows, keys = slice(length - 256, length), slice(length - 256 - 4096, length)
    local = mask.at(torch.arange(length)[rows].cuda(), torch.arange(length)[keys].cuda())
    small = tuple(x.double() for x in (q[:, rows], k[:, keys], v[:, keys], dout[:, rows]))
    exact_out, exact_lse = attend(*small[:3], local, backend="reference")
    exact = attend_backward(small[3], *small[:3], exact_out, exact_lse, local, backend="reference")
    assert float((out[:, rows].double() - exact_out).norm() / exact_out.norm()) < 3e-3
    assert float((dq[:, rows].double() - exact[0]).norm() / exact[0].norm()) < 3e-3
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()
    # Of the last 256 keys every row that sees them is among the last 256 rows.
    for got, wanted in ((dk, exact[1]), (dv, exact[2])):
        assert float((got[:, rows].double() - wanted[:, -256:]).norm() / wanted[:, -256:].norm()) < 3e-3


_SMALL = """
import torch
from farspan.kernels import IntervalMask, attend, attend_backward, masks
def with_gap(mask):  # no row of the second tile sees anything
    return IntervalMask(*(bound * (torch.arange(mask.rows) // 128 != 1) for bound in mask.bounds))
for rows, keys, dim in ((130, 130, 80), (257, 257, 64), (257, 257, 128), (300, 200, 64), (300, 200, 128)):
    whole = (masks.causal(500), with_gap(masks.sliding_window(500, 40, 3, [0, 1, 77, 500])))
    starts = ((0, 0), (0, 200), (200, 0))  # of rows and keys: a causal square, rows that see nothing, all keys
    for mask in (x.at(range(i, i + rows), range(j, j + keys)) for x in whole for i, j in starts):
        q, dout = (torch.randn(2, rows, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(2, keys, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        mask = mask.to("cuda")
        out, lse = attend(q, k, v, mask, backend="triton")
        attend_backward(dout, q, k, v, out, lse, mask, backend="triton")
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_touches_no_memory_out_of_bounds() -> None:
    # Without torch's pooling of memory, so that each tensor has bounds that the checker knows.
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", _SMALL]

    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
