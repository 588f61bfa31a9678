from __future__ import annotations

import sys

import pytest
import torch
from support.oracle import dense_attention, difference, mask_cases, random_qkv

from farspan.kernels import IntervalMask, attend, attend_backward, masks, merge
from farspan.kernels.backends import reference
from farspan.kernels.choice import Choice, Part
from farspan.kernels.problem import Problem
from farspan.kernels.rectangles import rectangles

NAMES = [case.name for case in mask_cases(16)]


@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_oracle_in_fp64(name: str, heads: tuple[int, int]) -> None:
    length = 61
    case = next(case for case in mask_cases(length) if case.name == name)
    q, k, v, dout = random_qkv(length, heads, 8, batch=2)
    out, lse = attend(q, k, v, case.mask)
    expected = dense_attention(q, k, v, case.allowed, dout)
    gradients = attend_backward(dout, q, k, v, out, lse, case.mask)
    for got, wanted in zip((out, lse, *gradients), expected, strict=True):
        assert difference(got, wanted) < 1e-12


def test_many_row_blocks_and_a_mask_for_each_row_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_ROWS", {"cpu": 7})
    cases = mask_cases(61)
    mask = masks.stack([cases[3].mask, cases[4].mask])
    allowed = torch.cat([cases[3].allowed, cases[4].allowed])
    q, k, v, dout = random_qkv(61, (4, 2), 8, batch=2)
    out, lse = attend(q, k, v, mask)
    results = (out, lse, *attend_backward(dout, q, k, v, out, lse, mask))
    for got, wanted in zip(results, dense_attention(q, k, v, allowed, dout), strict=True):
        assert difference(got, wanted) < 1e-12


def test_halves_of_the_keys_merge_to_the_whole() -> None:
    length, cut = 48, 20
    q, k, v, dout = random_qkv(length, (4, 2), 8)
    whole = masks.causal(length)
    expected = dense_attention(q, k, v, whole.visible(slice(0, length), slice(0, length)), dout)
    pieces = [(slice(0, cut), whole.at(range(length), range(cut)))]
    pieces += [(slice(cut, length), whole.at(range(length), range(cut, length)))]
    parts = [attend(q, k[:, keys], v[:, keys], mask) for keys, mask in pieces]
    out, lse = merge(*parts[0], *parts[1])
    assert difference(out, expected[0]) < 1e-12
    dq = torch.zeros_like(q)
    for keys, mask in pieces:
        _, dk, dv = attend_backward(dout, q, k[:, keys], v[:, keys], out, lse, mask, accumulate=(dq, None, None))
        assert difference(dk, expected[3][:, keys]) < 1e-12
        assert difference(dv, expected[4][:, keys]) < 1e-12
    assert difference(dq, expected[2]) < 1e-12


def test_accumulate_merges_and_adds_in_place() -> None:
    q, k, v, dout = random_qkv(24, (4, 2), 8)
    mask = masks.causal(24)
    first, second = mask.at(range(24), range(10)), mask.at(range(24), range(10, 24))
    total = attend(q, k[:, :10], v[:, :10], first)
    returned = attend(q, k[:, 10:], v[:, 10:], second, accumulate=total)
    assert returned[0] is total[0]
    out, lse = attend(q, k, v, mask)
    assert difference(total[0], out) < 1e-12
    assert difference(total[1], lse) < 1e-12
    sums = tuple(torch.ones_like(x) for x in (q, k, v))
    attend_backward(dout, q, k, v, out, lse, mask, accumulate=sums)
    for got, wanted in zip(sums, attend_backward(dout, q, k, v, out, lse, mask)):
        assert difference(got, wanted + 1) < 1e-12


def test_value_heads_may_have_their_own_size_and_inputs_any_stride() -> None:
    q, k, _, _ = random_qkv(24, (4, 2), 8)
    _, _, v, dout = random_qkv(24, (4, 2), 5)
    mask = masks.causal(24)
    expected = dense_attention(q, k, v, mask.visible(slice(0, 24), slice(0, 24)), dout)
    packed = torch.cat([q, k], 2)
    strided = (packed[:, :, :4], packed[:, :, 4:], v.transpose(1, 2).contiguous().transpose(1, 2))
    out, lse = attend(*strided, mask)
    assert difference(out, expected[0]) < 1e-12
    for got, wanted in zip(attend_backward(dout, *strided, out, lse, mask), expected[2:]):
        assert difference(got, wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v, dout = (x.to(dtype) for x in random_qkv(64, (4, 2), 16))
    mask = masks.sliding_window(64, 9, 2)
    expected = dense_attention(q, k, v, mask.visible(slice(0, 64), slice(0, 64)), dout)
    out, lse = attend(q, k, v, mask)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    wide, _ = attend(q, k, v, mask, out_dtype=torch.float32)
    assert difference(wide, expected[0]) < 1e-5
    assert torch.equal(wide.to(dtype), out)
    delta = (dout.float() * wide).sum(-1).transpose(1, 2)
    for got, wanted in zip(
        attend_backward(dout, q, k, v, None, lse, mask, delta=delta, out_dtype=torch.float32), expected[2:]
    ):
        assert difference(got, wanted) < 2e-5


def test_memory_is_bounded_by_the_row_block() -> None:
    class Largest(torch.overrides.TorchFunctionMode):
        elements = 0

        def __torch_function__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    length = 5000
    q, k, v, dout = random_qkv(length, (1, 1), 4, dtype=torch.float32)
    mask = masks.full(length)
    with Largest() as largest:
        out, lse = attend(q, k, v, mask)
        attend_backward(dout, q, k, v, out, lse, mask)
    assert 0 < largest.elements <= 64 * length


def test_errors_name_what_is_wrong() -> None:
    q, k, v, dout = random_qkv(8, (4, 2), 8)
    mask = masks.causal(8)
    with pytest.raises(ValueError, match=r"attention.backend is 'magic'; possible are auto, deterministic, reference"):
        attend(q, k, v, mask, backend="magic")
    with pytest.raises(ValueError, match="1 x 9 rows"):
        attend(q, k, v, masks.causal(9))
    with pytest.raises(ValueError, match="multiple of Hkv"):
        attend(q[:, :, :3], k, v, mask)
    with pytest.raises(ValueError, match="both are None"):
        attend_backward(dout, q, k, v, None, torch.zeros(1, 4, 8), mask)
    assert isinstance(mask, IntervalMask)


@pytest.mark.parametrize("smallest", [1, 8, 1000])
@pytest.mark.parametrize("name", [case.name for case in mask_cases(8)])
def test_calls_over_rectangles_and_a_rest_are_the_whole(
    name: str, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are put in their places where the calls are apart, and added up where they are not, or are asked to."""
    case = next(case for case in mask_cases(47) if case.name == name)
    cut = rectangles(case.mask, 47, smallest, most=9)

    def cut_up(problem: Problem, mask: IntervalMask, backend: str) -> Choice:
        parts = [] if cut.rest is None else [Part("reference", slice(0, 47), slice(0, 47), cut.rest)]
        parts += [
            Part("reference", slice(*part.rows), slice(*part.keys), part.mask(mask.device)) for part in cut.rectangles
        ]
        return Choice(tuple(parts), cut.rows_apart and (cut.keys_apart or not problem.backward))

    q, k, v, dout = random_qkv(47, (4, 2), 8)
    expected = dense_attention(q, k, v, case.allowed, dout)
    monkeypatch.setattr(sys.modules[attend.__module__], "choose", cut_up)
    out, lse = attend(q, k, v, case.mask)
    gradients = attend_backward(dout, q, k, v, out, lse, case.mask)
    for got, wanted in zip((out, lse, *gradients), expected, strict=True):
        assert difference(got, wanted) < 1e-12
    total = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    sums = tuple(torch.zeros_like(x) for x in (q, k, v))
    attend(q, k, v, case.mask, accumulate=total)
    attend_backward(dout, q, k, v, out, lse, case.mask, accumulate=sums)
    for got, wanted in zip((*total, *sums), expected, strict=True):
        assert difference(got, wanted) < 1e-12
