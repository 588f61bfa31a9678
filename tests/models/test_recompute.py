"""What is computed again changes no bit, and selective recomputation never runs attention a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from support.pool import Pool
from torch import Tensor, nn

from farspan.kernels import masks
from farspan.models import offload
from farspan.models.attention import AttentionContext
from farspan.models.config import ModelConfig, RecomputeMode
from farspan.models.decoder import Decoder, DecoderInput, Layer
from farspan.models.layers import Sharding
from farspan.models.offload import HostMemory
from farspan.models.recompute import DeviceMemory, Recomputation, on_device
from farspan.parallel import execute, orders, plans
from farspan.parallel.degrees import Degrees
from farspan.parallel.execute import LayerMemory
from farspan.parallel.mesh import Mesh
from farspan.parallel.plan import Schedule
from farspan.parallel.prepare import prepare
from farspan.parallel.wire import Wire

pytestmark = pytest.mark.distributed

LENGTH, LAYERS, VOCABULARY, MICRO_BATCHES = 45, 3, 64, 2
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocabulary_size=VOCABULARY,
    hidden_size=32,
    layers=LAYERS,
    heads=4,
    kv_heads=2,
    head_dim=8,
    feed_forward_size=48,
    qkv_bias=True,
    qk_norm=True,
)


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Counts the layers that are computed, the kernels that the executor calls, and the messages that it sends."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any], cost: Callable[..., int]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += cost(*args)
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(Layer, "forward", counting("layers", Layer.forward, lambda *_: 1)),
        mock.patch.object(execute, "attend", counting("forward", execute.attend, lambda *_: 1)),
        mock.patch.object(execute, "attend_backward", counting("backward", execute.attend_backward, lambda *_: 1)),
        mock.patch.object(Wire, "send", counting("sent", Wire.send, lambda wire, stage, outgoing, _: len(outgoing))),
    ):
        yield calls


def batch(mesh: Mesh, number: int) -> DecoderInput:
    order = orders.zigzag(LENGTH, mesh.degrees.context)
    mask = masks.causal(LENGTH, [0, 7, 33, 45] if number else [0, 20, 45])
    plan = plans.ring(order, mask, (4 // mesh.degrees.tensor, 2 // mesh.degrees.tensor))
    if number:  # keys and values of others are kept for the backward pass, not sent again
        homeward = Schedule(tuple(move for move in plan.backward.moves if move.home), plan.backward.pieces)
        arrived = frozenset((move.dst, move.block) for move in plan.forward.moves)
        plan = replace(plan, backward=homeward, kept=arrived)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(number))
    labels = tokens.roll(-1, 1)
    labels[:, ::5] = -100
    return DecoderInput(
        tokens=order.shard(tokens, mesh.context_rank),
        labels=order.shard(labels, mesh.context_rank, padding=-100),
        rotary_positions=order.shard(torch.arange(LENGTH)[None], mesh.context_rank),
        plans=[prepare(plan, order, mask, mesh.context_rank)] * LAYERS,
        group=mesh.context,
    )


# Losses by micro-batch, gradients by name, and calls by kind.
Step = tuple[list[Tensor], dict[str, Tensor], dict[str, int]]


def step(mesh: Mesh, recomputation: Recomputation) -> Step:
    """Of two micro-batches, both forward passes come before both backward passes."""
    model = Decoder(CONFIG, Sharding(mesh.degrees.tensor), loss_chunk_tokens=7, recomputation=recomputation)
    with counted_calls() as calls:
        outputs = [model(batch(mesh, number)) for number in range(MICRO_BATCHES)]
        for total, _ in outputs:
            total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return [losses for _, losses in outputs], gradients, dict(calls)


# Mode, whether what is kept goes to the host, and how many layers keep everything.
Case = tuple[RecomputeMode, bool, int]
MODES: tuple[RecomputeMode, ...] = ("full", "selective")
CASES: list[Case] = [("none", False, 0), ("selective", False, LAYERS), *product(MODES, (False, True), (0, 2))]


def steps(rank: int, world: int, context: int, tensor: int) -> dict[Case, Step]:
    mesh = Mesh.create(Degrees(world // (context * tensor), context, tensor), CPU)
    try:
        with mock.patch.object(offload, "PAGE_BYTES", 256):  # most tensors have several pages, and none a whole number
            keeps = {False: on_device, True: HostMemory(CPU).layer}
            return {case: step(mesh, Recomputation(case[0], keeps[case[1]], case[2])) for case in CASES}
    finally:
        mesh.destroy()


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_the_same_bits_and_attention_once(pool: Pool, context: int, tensor: int) -> None:
    for results in pool.run(context * tensor, steps, context, tensor):
        losses, gradients, calls = results["none", False, 0]
        assert calls["layers"] == LAYERS * MICRO_BATCHES
        assert calls["forward"] >= LAYERS * MICRO_BATCHES
        assert (calls.get("sent", 0) > 0) == (context > 1)
        for (mode, offloaded, keep_layers), (other_losses, other_gradients, other_calls) in results.items():
            case = f"{mode}, offloaded: {offloaded}, layers that keep everything: {keep_layers}"
            again = 0 if mode == "none" else LAYERS - keep_layers
            assert all(map(torch.equal, other_losses, losses)), case
            assert [name for name in gradients if not torch.equal(other_gradients[name], gradients[name])] == [], case
            assert other_calls["layers"] == (LAYERS + again) * MICRO_BATCHES, case
            assert other_calls["backward"] == calls["backward"], case
            if mode == "full":
                assert other_calls["forward"] * LAYERS == calls["forward"] * (LAYERS + again), case
            else:
                assert other_calls | {"layers": 0} == calls | {"layers": 0}, case


class Square(nn.Module):
    def forward(self, x: Tensor, context: object) -> Tensor:
        return x * x


def test_the_last_layers_are_those_that_keep_everything() -> None:
    called: list[str] = []

    def keep(last: bool) -> LayerMemory:
        called.append(f"kept, last: {last}")
        return DeviceMemory()

    layers = nn.ModuleList([Square() for _ in range(4)])
    for name, layer in layers.named_children():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    x = torch.full((3,), 1.5, requires_grad=True)
    Recomputation("full", keep, 2)(layers, x, [mock.Mock()] * 4)
    assert called == ["kept, last: False", "0", "kept, last: True", "1", "2", "3"]


def test_a_second_backward_pass_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    context = AttentionContext(mock.Mock(), None, mock.Mock())
    out = Recomputation("full")(nn.ModuleList([Square(), Square()]), x, [context] * 2)
    out.sum().backward(retain_graph=True)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    with pytest.raises(RuntimeError, match="what a layer keeps is for one backward pass, and this is the second"):
        out.sum().backward()


def test_without_gradients_nothing_is_kept() -> None:
    def keep(last: bool) -> LayerMemory:
        raise AssertionError

    with torch.no_grad():
        out = Recomputation("full", keep)(nn.ModuleList([Square()]), torch.full((3,), 2.0), [mock.Mock()])
    assert torch.equal(out, torch.full((3,), 4.0))
