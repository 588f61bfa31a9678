"""The loss of a large vocabulary: time, memory and error of its forward and backward pass together.

    python benchmarks/loss.py --output loss.jsonl

Qwen2.5-3B's vocabulary in bf16, one step of 32,768 tokens: all logits at once in plain PyTorch, Farspan's loss in
chunks of several sizes and once without compiled functions, and Liger-Kernel's where it is installed. TFLOP/s are those
of the three matrix products, `extra_gib` is memory beyond inputs and their gradients. Errors are relative (L2) to fp64
on 512 tokens. Needs a CUDA device. Prints a table and appends one JSON object a line to --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from layer import milliseconds, report
from torch import Tensor, nn

from farspan.launch.quiet import quiet_libraries
from farspan.models.config import ModelConfig
from farspan.parallel.degrees import Degrees

quiet_libraries()  # before Megatron is imported

from farspan.models import loss  # noqa: E402
from farspan.models.layers import Sharding  # noqa: E402
from farspan.parallel.mesh import Mesh  # noqa: E402

CHECKED = 512  # tokens that are compared with fp64
VOCABULARY = 151_936
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--hidden", type=int, default=ModelConfig.model_validate({"preset": "qwen2.5-3b"}).hidden_size)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    sizes = (options.tokens, options.hidden, options.vocabulary)
    with on_one_rank():
        results = [measure(name, function, *sizes) for name, function in candidates().items()]
    report(results, "loss of {:,} tokens, hidden {:,}, vocabulary {:,}".format(*sizes), options.output)


def candidates() -> dict[str, Loss]:
    """Each gives the sum of the losses of `(hidden, weight, labels)`."""
    found: dict[str, Loss] = {"all logits": all_logits, "chunks of 4096, plain": plain}
    found |= {f"chunks of {2**power}": chunked(2**power) for power in range(10, 15)}
    return found | ({"liger": liger} if importlib.util.find_spec("liger_kernel") else {})


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def chunked(chunk_tokens: int) -> Loss:
    return lambda hidden, weight, labels: loss.VocabularyLoss(chunk_tokens, Sharding())(hidden, weight, labels)[0]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    names = ("_row_statistics", "_logits_to_gradient")
    with mock.patch.multiple(loss, **{name: getattr(loss, name).__wrapped__ for name in names}):
        return chunked(4096)(hidden, weight, labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    total: Tensor = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum", accum_dtype=torch.float32)
    return total


def measure(name: str, function: Loss, tokens: int, hidden_size: int, vocabulary: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(rows: int, std: float) -> Tensor:
        x = torch.randn(rows, hidden_size, device="cuda", generator=generator) * std
        return x.bfloat16().requires_grad_()

    hidden, weight = normal(tokens, 1.0), normal(vocabulary, 0.05)
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    labels[::17] = -100

    def gradients(function: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(hidden, weight, labels) / len(labels), (hidden, weight))

    gradients(function, hidden, weight, labels)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(lambda: gradients(function, hidden, weight, labels), repeats=5)
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    few = hidden[:CHECKED].detach().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (few, weight)]
    with mock.patch.object(Tensor, "float", Tensor.double):
        wanted = gradients(all_logits, *exact, labels[:CHECKED])
    got = gradients(function, few, weight, labels[:CHECKED])
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
    return {
        "name": name,
        "ms": took,
        "tflop_s": 3 * 2 * tokens * vocabulary * hidden_size / took / 1e9,
        "extra_gib": extra / 2**30,
        "dhidden_error": errors[0],
        "dweight_error": errors[1],
    }


@contextmanager
def on_one_rank() -> Iterator[None]:
    """A process group and a tensor group of this process alone, which the loss asks for."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
        yield
        mesh.destroy()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
