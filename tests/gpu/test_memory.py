"""On a GPU: recomputation and offloading change no bit and save memory; the loss takes one chunk and never waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import masks
from farspan.models.config import ModelConfig, RecomputeMode
from farspan.models.decoder import Decoder, DecoderInput
from farspan.models.layers import Sharding
from farspan.models.loss import VocabularyLoss
from farspan.models.offload import PAGE_BYTES, HostMemory
from farspan.models.recompute import Recomputation, on_device
from farspan.parallel import orders, plans
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.parallel.prepare import prepare

pytestmark = pytest.mark.gpu

LENGTH, LAYERS, STEPS = 16384, 6, 3
CONFIG = ModelConfig(
    vocabulary_size=1024,
    hidden_size=1024,
    layers=LAYERS,
    heads=8,
    kv_heads=2,
    head_dim=128,
    feed_forward_size=2048,
    qk_norm=True,
)
# What one layer's input and attention's out take each, in bf16.
STREAM_BYTES = 2 * LENGTH * CONFIG.hidden_size
# Mode, whether what is kept goes to the host, and how many layers keep everything.
CASES: list[tuple[RecomputeMode, bool, int]] = [
    ("none", False, 0),
    ("selective", False, 0),
    ("full", False, 0),
    ("selective", True, 0),
    ("full", True, 0),
    ("selective", False, 2),
    ("selective", True, 2),
]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, device_id=device)
    mesh = Mesh.create(Degrees(1, 1, 1), device)
    yield mesh
    mesh.destroy()
    dist.destroy_process_group()


def batch(number: int) -> DecoderInput:
    order = orders.contiguous(LENGTH, 1)
    mask = masks.sliding_window(LENGTH, 256)
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 1024, (1, LENGTH), generator=generator).cuda()
    plan = prepare(plans.build("single", order, mask, (8, 2)), order, mask, 0, "cuda")
    return DecoderInput(tokens, tokens.roll(-1, 1), torch.arange(LENGTH, device="cuda")[None], [plan] * LAYERS, None)


def steps(recomputation: Recomputation) -> tuple[list[Tensor], int, int]:
    """Losses and gradients of some steps, and bytes: held between the passes, and most of the whole of a step."""
    model = Decoder(CONFIG, Sharding(), recomputation=recomputation).cuda().bfloat16()
    results, held, peak = [], 0, 0
    for number in range(STEPS):
        model.zero_grad()
        taken = batch(number)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        total, losses = model(taken)
        held = torch.cuda.memory_allocated() - before
        total.backward()
        peak = torch.cuda.max_memory_allocated() - before
        # Copied after all that was queued: memory that was given away too early would have been written by then.
        results += [losses, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
    torch.cuda.synchronize()
    return results, held, peak


def test_recomputation_and_offloading_change_no_bit_and_save_memory(mesh: Mesh) -> None:
    host = HostMemory(mesh.device)
    found = {
        (mode, offload, kept): steps(Recomputation(mode, host.layer if offload else on_device, kept))
        for mode, offload, kept in CASES
    }
    for case, (_, held, peak) in found.items():
        print(f"{case}: {held / 2**20:.0f} MiB held, {peak / 2**20:.0f} MiB at most")
    plain = found["none", False, 0][0]
    assert len(plain) > STEPS * LAYERS
    for case, (results, _, _) in found.items():
        assert all(map(torch.equal, results, plain)), case
    held = {case: bytes_held for case, (_, bytes_held, _) in found.items()}
    assert held["none", False, 0] > held["selective", False, 0] + 2 * LAYERS * STREAM_BYTES
    assert held["selective", False, 0] > held["full", False, 0] + 0.9 * LAYERS * STREAM_BYTES
    # Two layers of all keep what all do without recomputation.
    layer = (held["none", False, 0] - held["selective", False, 0]) / LAYERS
    assert abs(held["selective", False, 2] - held["selective", False, 0] - 2 * layer) < STREAM_BYTES
    assert held["selective", True, 0] + layer < held["selective", True, 2] < held["selective", False, 2]
    # Only the last layer's stay; so two tensors of each other layer are gone, or one.
    assert held["selective", False, 0] - held["selective", True, 0] > 0.95 * 2 * (LAYERS - 1) * STREAM_BYTES
    assert held["full", False, 0] - held["full", True, 0] > 0.95 * (LAYERS - 1) * STREAM_BYTES
    assert found["selective", True, 0][2] < found["selective", False, 0][2]
    assert host.pages == (LAYERS - 1) * (2 * STREAM_BYTES // PAGE_BYTES + 1)  # lse has one


def test_the_loss_is_exact_bounded_by_its_chunk_and_never_waits_for_the_gpu(mesh: Mesh) -> None:
    tokens, hidden_size, vocabulary, chunk = 8192, 512, 50_000, 1024
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device="cuda", generator=generator) / 20).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    labels[::3] = -100
    hidden.data[::3] = torch.nan
    loss = VocabularyLoss(chunk, Sharding())

    def gradients() -> tuple[Tensor, ...]:
        total, _ = loss(hidden, weight, labels)
        return torch.autograd.grad(total / tokens, (hidden, weight))

    gradients()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before
    # Logits in bf16, no other tensor of this size; the weight's gradient in fp32 and in bf16; hidden's, scaled and not.
    assert extra < 1.1 * 2 * chunk * vocabulary + 6 * weight.numel() + 2 * 2 * hidden.numel() + 2**24

    valid = labels != -100
    rows, matrix = hidden.detach()[valid].double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(rows @ matrix.T, labels[valid], reduction="sum") / tokens
    wanted = torch.autograd.grad(exact, (rows, matrix))
    assert bool((got[0][~valid] == 0).all())
    for tensor, reference in zip((got[0][valid], got[1]), wanted, strict=True):
        assert float((tensor.double() - reference).norm() / reference.norm()) < 4e-3
