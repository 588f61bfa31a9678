"""Who computes what of a mask, on tables made up for it, and what is refused with the key to change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from farspan.kernels import IntervalMask, masks, rates
from farspan.kernels.choice import check_backend, choose, in_words
from farspan.kernels.problem import Problem
from farspan.kernels.rates import Rates

LENGTH = 8192
# fp16, for the interpreter of a machine without a GPU refuses bf16.
PROBLEM = Problem(1, LENGTH, 32, 8, 128, 128, torch.float16, (9, 0))
FULL = IntervalMask(*(torch.full((1, LENGTH), bound) for bound in (0, LENGTH, 0, 0)))


def table(**rates_by_backend: tuple[float, float, float]) -> Rates:
    """(causal, full, lists) in TFLOP/s, the same in both directions, at every length above 128."""
    return Rates(
        "sm_90",
        "a GPU",
        "1",
        "1",
        {
            f"{backend} {direction} {kind} 128": [(128, rate)]
            for backend, measured in rates_by_backend.items()
            for direction in ("forward", "backward")
            for kind, rate in zip(("causal", "full", "lists"), measured)
            if rate
        },
    )


def chosen(problem: Problem, mask: IntervalMask, backend: str = "auto") -> str:
    return in_words(choose(problem, mask, backend).parts)


@pytest.fixture(autouse=True)
def fast_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, table(triton=(400, 500, 300), cudnn=(600, 450, 0), flash=(300, 300, 0)))


def use(monkeypatch: pytest.MonkeyPatch, made_up: Rates) -> None:
    monkeypatch.setattr(rates, "of_capability", lambda capability: made_up)


@pytest.mark.parametrize("backward", [False, True])
def test_the_fastest_backend_takes_a_mask_that_is_one_rectangle(backward: bool) -> None:
    problem = replace(PROBLEM, backward=backward)
    (part,) = choose(problem, masks.causal(LENGTH), "auto").parts
    assert (part.backend, part.rows, part.keys) == ("cudnn", slice(0, LENGTH), slice(0, LENGTH))
    assert chosen(problem, FULL) == "triton"


def test_a_batch_of_equal_causal_rows_is_one_rectangle_too() -> None:
    both = masks.stack([masks.causal(LENGTH)] * 2)
    assert chosen(replace(PROBLEM, batch=2), both) == "cudnn"
    documents = masks.causal(LENGTH, [0, 100, LENGTH])
    assert chosen(replace(PROBLEM, batch=2), masks.stack([masks.causal(LENGTH), documents])) == "triton"


def test_a_library_that_is_little_faster_does_not_pay_for_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of its own is read again and added; ours is added in the kernel."""
    use(monkeypatch, table(triton=(500, 500, 500), cudnn=(501, 501, 0)))
    short = masks.causal(1024)
    for backward in (False, True):
        problem = replace(PROBLEM, keys=1024, backward=backward)
        assert chosen(problem, short) == "cudnn"
        assert chosen(replace(problem, accumulate=True), short) == "triton"


def test_documents_go_to_a_library_only_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 32768
    problem = replace(PROBLEM, keys=length)
    large, small = (masks.causal(length, range(0, length + 1, length // n)) for n in (4, 256))
    assert chosen(problem, large) == "4 cudnn"
    assert choose(problem, large, "auto").apart
    assert choose(replace(problem, backward=True), large, "auto").apart
    assert chosen(problem, small) == "triton"
    use(monkeypatch, table(triton=(400, 500, 580), cudnn=(600, 450, 0)))
    assert chosen(problem, masks.causal(length, range(0, length + 1, length // 4))) == "triton"


def test_a_library_that_plans_each_shape_gets_none_that_will_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN makes a plan for each new shape, which takes longer than what it could save; FlashAttention does not."""
    length = 32768
    problem, edges = replace(PROBLEM, keys=length), [0, 8000, 16100, 24500, length]
    use(monkeypatch, table(triton=(400, 500, 400), cudnn=(600, 450, 0)))
    assert chosen(problem, masks.causal(length, edges)) == "triton"
    use(monkeypatch, table(triton=(400, 500, 400), cudnn=(600, 450, 0), flash=(550, 300, 0)))
    assert chosen(problem, masks.causal(length, edges)) == "4 flash"
    assert chosen(replace(PROBLEM, keys=1001), masks.causal(1001)) == "cudnn"  # a row's own length does come again


def test_the_rest_of_a_mask_goes_to_triton() -> None:
    length = 65536
    edges = [0, 39936, 65024, *range(65100, length, 100), length]
    mask = masks.causal(length, edges)
    found = choose(replace(PROBLEM, keys=length), mask, "auto").parts
    assert [part.backend for part in found] == ["triton", "cudnn", "cudnn"]
    area = found[0].mask.area()
    assert area == sum((b - a) * (b - a + 1) // 2 for a, b in pairwise(edges[2:]))
    assert area + sum((b - a) * (b - a + 1) // 2 for a, b in pairwise(edges[:3])) == mask.area()


def test_deterministic_leaves_out_whose_gradients_do_not_repeat() -> None:
    mask = masks.causal(LENGTH)
    assert chosen(PROBLEM, mask, "deterministic") == "cudnn"
    assert chosen(replace(PROBLEM, backward=True), mask, "auto") == "cudnn"
    assert chosen(replace(PROBLEM, backward=True), mask, "deterministic") == "triton"


def test_windows_go_to_triton_in_one_call() -> None:
    assert chosen(PROBLEM, masks.sliding_window(LENGTH, 1000)) == "triton"


def test_rows_that_travel_do_not_meet_a_library() -> None:
    problem = replace(PROBLEM, backward=True, out_given=False)
    assert chosen(problem, masks.causal(LENGTH)) == "triton"
    with pytest.raises(ValueError, match=r"attention.backend is 'cudnn', but cudnn .* needs the global out"):
        choose(problem, masks.causal(LENGTH), "cudnn")


def test_without_a_gpu_auto_is_the_reference() -> None:
    assert chosen(replace(PROBLEM, capability=None, dtype=torch.float64), masks.causal(LENGTH)) == "reference"


def test_a_choice_is_made_once_a_mask_and_problem() -> None:
    mask = masks.causal(LENGTH)
    assert choose(PROBLEM, mask, "auto") is choose(replace(PROBLEM), mask, "auto")
    assert choose(PROBLEM, mask, "auto") is not choose(replace(PROBLEM, accumulate=True), mask, "auto")


def test_an_explicit_library_computes_what_is_made_of_rectangles() -> None:
    assert chosen(PROBLEM, masks.causal(LENGTH), "flash") == "flash"
    assert chosen(PROBLEM, masks.causal(LENGTH, range(0, LENGTH + 1, 128)), "flash") == "64 flash"


@pytest.mark.parametrize(
    "mask",
    [masks.sliding_window(LENGTH, 1000), masks.causal(LENGTH, range(0, LENGTH + 1, 64))],
    ids=["window", "128 documents"],
)
def test_an_explicit_library_refuses_other_masks(mask: IntervalMask) -> None:
    with pytest.raises(ValueError, match=r"attention.backend is 'flash', .* not 64 or fewer of them; set it to auto"):
        choose(PROBLEM, mask, "flash")


@pytest.mark.parametrize(
    ("backend", "change", "words"),
    [
        ("triton", {"dtype": torch.float64}, "triton takes bf16, fp16 and fp32, got torch.float64"),
        ("triton", {"head_dim": 320}, "triton takes head dims up to 256"),
        ("cudnn", {"capability": None}, "cudnn needs a GPU"),
        ("cudnn", {"capability": (8, 0)}, "cudnn needs a GPU of compute capability 9.0 or newer"),
        ("cudnn", {"head_dim": 192, "value_dim": 192}, "a multiple of 8 up to 128, got 192 and 192"),
        ("flash", {"value_dim": 64}, "got 128 and 64"),
        ("flash", {"dtype": torch.float32}, "flash takes bf16 and fp16, got torch.float32"),
    ],
)
def test_refusals_name_the_key(backend: str, change: dict[str, object], words: str) -> None:
    problem = replace(PROBLEM, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"attention.backend is '{backend}', but") as caught:
        check_backend(problem, backend)
    assert words in str(caught.value)
    assert str(caught.value).endswith("; set it to auto")
    with pytest.raises(ValueError, match=r"attention.backend is"):
        choose(problem, masks.causal(LENGTH), backend)
    check_backend(problem, "auto")
