"""The Triton kernels: on a CPU in Triton's interpreter, in fp32 and fp16; on a GPU see tests/gpu/test_attend.py."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from support.oracle import MaskCase, dense_attention, mask_cases, random_qkv
from torch import Tensor

from farspan.kernels import IntervalMask, attend, attend_backward, masks, merge, row_delta
from farspan.kernels.triton import rows as row_kernels
from farspan.parallel import orders

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = [case.name for case in mask_cases(16)]
ORDERS = ["whole", "contiguous", "zigzag", "striped"]
PRODUCT = list(product(MASKS, (64, 128), (1, 4, 8), ORDERS))
# Neighbours in the product differ in their order; every 7th case meets each pair of choices.
SAMPLE = PRODUCT[::7]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that an element that no kernel writes shows."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def piece(name: str, order: str, length: int = 290) -> tuple[MaskCase, Tensor, Tensor]:
    """A mask, and the positions of the rows and keys of a piece: what rank 1 of 2 computes with the keys of rank 0."""
    case = next(case for case in mask_cases(length) if case.name == name)
    if order == "whole":
        return case, torch.arange(length), torch.arange(length)
    built = orders.build(order, length, 2, 128)
    rows, keys = (torch.as_tensor(built.positions[rank]) for rank in (1, 0))
    return case, rows[rows < length], keys[keys < length]


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1))


def check(case: MaskCase, rows: Tensor, keys: Tensor, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    q, k, v, dout = (x.to(DEVICE, dtype) for x in random_qkv(case.mask.rows, heads, dim))
    q, dout, k, v = q[:, rows], dout[:, rows], k[:, keys], v[:, keys]
    mask = case.mask.at(rows, keys).to(DEVICE)
    allowed = case.allowed[:, rows][:, :, keys].to(DEVICE)
    out, lse = attend(q, k, v, mask, backend="triton", out_dtype=torch.float32)
    gradients = attend_backward(dout, q, k, v, out, lse, mask, backend="triton", out_dtype=torch.float32)
    expected = dense_attention(q, k, v, allowed, dout)
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for got, wanted in zip((out, *gradients), (expected[0], *expected[2:]), strict=True):
        assert relative(got, wanted) < bound
    assert torch.equal(lse.isinf(), expected[1].isinf())
    assert float((lse - expected[1]).nan_to_num(0, posinf=0, neginf=0).abs().max()) < 1e-4 + bound


@pytest.mark.parametrize(("name", "dim", "group", "order"), SAMPLE)
def test_equals_the_oracle(name: str, dim: int, group: int, order: str) -> None:
    check(*piece(name, order), (group, 1), dim, torch.float32)


@pytest.mark.full
@pytest.mark.parametrize(("name", "dim", "group", "order"), [case for case in PRODUCT if case not in SAMPLE])
def test_equals_the_oracle_everywhere(name: str, dim: int, group: int, order: str) -> None:
    check(*piece(name, order), (group, 1), dim, torch.float32)


@pytest.mark.parametrize("name", ["causal", "documents", "star"])
def test_half_precision(name: str) -> None:
    check(*piece(name, "zigzag"), (4, 2), 64, torch.float16)


@pytest.mark.parametrize("dim", [16, 80, 96, 192, 256])
def test_other_head_dims(dim: int) -> None:
    check(*piece("window", "whole", 130), (2, 1), dim, torch.float32)


@pytest.mark.parametrize("length", [1, 127, 128, 129])
def test_lengths_around_a_tile(length: int) -> None:
    case = MaskCase("causal", masks.causal(length), torch.ones(length, length).tril().bool()[None])
    check(case, torch.arange(length), torch.arange(length), (2, 1), 64, torch.float32)


def test_a_mask_for_each_row_of_the_batch_strided_inputs_and_another_value_dim() -> None:
    cases = [case for case in mask_cases(150) if case.name in ("window", "question")]
    mask = masks.stack([case.mask for case in cases]).to(DEVICE)
    q, k, _, _ = (x.to(DEVICE, torch.float32) for x in random_qkv(150, (4, 2), 64, batch=2))
    _, _, v, dout = (x.to(DEVICE, torch.float32) for x in random_qkv(150, (4, 2), 32, batch=2))
    packed = torch.cat([q, k], 2)
    q, k, v = packed[:, :, :4], packed[:, :, 4:], v.transpose(1, 2).contiguous().transpose(1, 2)
    dout = dout.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # not even the last dim is contiguous
    out, lse = attend(q, k, v, mask, backend="triton")
    results = (out, lse, *attend_backward(dout, q, k, v, out, lse, mask, backend="triton"))
    allowed = torch.cat([case.allowed for case in cases]).to(DEVICE)
    for got, wanted in zip(results, dense_attention(q, k, v, allowed, dout), strict=True):
        assert relative(got.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0)) < 1e-5


@pytest.mark.parametrize("name", ["causal", "documents", "blind"])
def test_shares_of_the_keys_accumulate_to_the_whole(name: str) -> None:
    length, cut = 200, 70
    case = next(case for case in mask_cases(length) if case.name == name)
    q, k, v, dout = (x.to(DEVICE, torch.float32) for x in random_qkv(length, (4, 2), 64))
    expected = dense_attention(q, k, v, case.allowed.to(DEVICE), dout)
    shares = [
        (keys, case.mask.at(range(length), range(keys.start, keys.stop)).to(DEVICE))
        for keys in (slice(0, cut), slice(cut, length))
    ]
    # Through the kernel's own merging, and through merge.
    total = torch.zeros_like(q), q.new_full((1, 4, length), float("-inf"))
    for keys, mask in shares:
        attend(q, k[:, keys], v[:, keys], mask, backend="triton", accumulate=total)
    merged = merge(*(x for keys, mask in shares for x in attend(q, k[:, keys], v[:, keys], mask, backend="triton")))
    for out, lse in (total, merged):
        assert relative(out, expected[0]) < 1e-5
        assert torch.equal(lse.isinf(), expected[1].isinf())
        assert relative(lse.nan_to_num(neginf=0), expected[1].nan_to_num(neginf=0)) < 1e-6
    sums = tuple(torch.ones_like(x) for x in (q, k, v))
    delta = row_delta(dout, total[0])
    for keys, mask in shares:
        into = (sums[0], sums[1][:, keys], sums[2][:, keys])
        attend_backward(
            dout, q, k[:, keys], v[:, keys], None, total[1], mask, delta=delta, backend="triton", accumulate=into
        )
    for got, wanted in zip(sums, expected[2:], strict=True):
        assert relative(got - 1, wanted) < 1e-5


def test_a_mask_that_shows_nothing_gives_nothing() -> None:
    q, k, v, dout = (x.to(DEVICE, torch.float32) for x in random_qkv(130, (2, 1), 64))
    zero = torch.zeros(1, 130, dtype=torch.int32, device=DEVICE)
    mask = IntervalMask(zero, zero, zero, zero)
    out, lse = attend(q, k, v, mask, backend="triton")
    assert not out.any()
    assert (lse == float("-inf")).all()
    assert not any(x.any() for x in attend_backward(dout, q, k, v, out, lse, mask, backend="triton"))


def test_delta_is_the_row_sum_of_dout_and_out() -> None:
    out, _, _, dout = (x.to(DEVICE, torch.float32) for x in random_qkv(130, (4, 2), 80))
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    assert relative(row_kernels.row_delta(dout, out), (dout * out).sum(-1).transpose(1, 2)) < 1e-6


def test_what_it_cannot_take_is_refused_in_one_line() -> None:
    def refused(message: str, **change: Any) -> None:
        q = torch.zeros(1, 4, 2, change.get("dim", 64), dtype=change.get("dtype", torch.float32), device=DEVICE)
        with pytest.raises(ValueError, match=message) as caught:
            attend(q, q, q, masks.causal(4).to(DEVICE), backend="triton")
        assert "attention.backend" in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("bf16, fp16 and fp32, got torch.float64", dtype=torch.float64)
    refused("head dims up to 256", dim=320)
    refused("multiples of 16 bytes", dim=66)
