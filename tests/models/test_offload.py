"""What goes to the host comes back the same, and pages are used again."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor

from farspan.models import offload
from farspan.models.offload import HostMemory, OffloadedLayer

LAYERS, PAGES = 4, 2 + 1 + 1 + 1
# Uneven in every way: a page and most of a second, exactly one, less than one, and nothing, which takes one too.
SHAPES = {
    "input": ((5, 50, torch.bfloat16),),
    "attention": ((4, 16, torch.float32), (3, 7, torch.float64), (0, 9, torch.int8)),
}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PAGE_BYTES", 256)


def kept(layer: int) -> dict[str, tuple[Tensor, ...]]:
    return {
        name: tuple(torch.arange(a * b).view(a, b).add(layer).to(dtype) for a, b, dtype in shapes)
        for name, shapes in SHAPES.items()
    }


def forward(host: HostMemory, layers: int = LAYERS) -> list[OffloadedLayer]:
    memories = []
    for number in range(layers):
        memories.append(host.layer(last=number == layers - 1))
        for name, tensors in kept(number).items():
            assert memories[-1].take(name) is None
            memories[-1].put(name, tensors)
    return memories


def backward(memories: list[OffloadedLayer]) -> None:
    for number, memory in reversed(list(enumerate(memories))):
        for name, wanted in kept(number).items():
            got = memory.take(name)
            assert got is not None
            for a, b in zip(got, wanted, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
            assert memory.take(name) is None


def test_all_comes_back_and_pages_are_allocated_once() -> None:
    host = HostMemory(torch.device("cpu"))
    pages = set()
    for _ in range(3):
        backward(forward(host))
        pages.add(host.pages)
    assert pages == {(LAYERS - 1) * PAGES}  # the last layer's stay on the device


def test_micro_batches_may_be_in_flight_together() -> None:
    host = HostMemory(torch.device("cpu"))
    first, second = forward(host), forward(host)
    backward(first)
    backward(second)
    backward(forward(host))
    assert host.pages == 2 * (LAYERS - 1) * PAGES


def test_a_forward_pass_without_a_backward_pass_gives_its_pages_back() -> None:
    host = HostMemory(torch.device("cpu"))
    for _ in range(3):
        forward(host)
        gc.collect()
    assert host.pages == (LAYERS - 1) * PAGES


def test_the_layer_before_is_on_its_way_when_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMemory(torch.device("cpu"))
    memories = forward(host)
    fetched: list[OffloadedLayer] = []
    fetch = OffloadedLayer.fetch

    def noted(memory: OffloadedLayer) -> None:
        fetched.append(memory)
        fetch(memory)

    monkeypatch.setattr(OffloadedLayer, "fetch", noted)
    memories[3].take("input")
    assert fetched == [memories[3], memories[2]]
    memories[3].take("attention")
    memories[2].take("input")
    assert fetched[-2:] == [memories[2], memories[1]]


def test_a_layer_holds_no_device_memory_once_the_next_has_begun() -> None:
    host = HostMemory(torch.device("cpu"))
    alive, memories = [], []
    for number in range(3):
        memories.append(host.layer(last=number == 2))
        tensor = torch.full((10,), number)
        memories[-1].put("input", (tensor,))
        alive.append(ref(tensor))
        del tensor
    assert [tensor() is None for tensor in alive] == [True, True, False]
