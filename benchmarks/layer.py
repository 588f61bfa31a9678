"""The layer outside attention and the matrix products: which implementation makes the fewest passes over memory?

    python benchmarks/layer.py --output layer.jsonl

Element-wise functions of Qwen2.5-3B in bf16: as plain PyTorch, as Farspan compiles them, and as Liger-Kernel has them
where it is installed. GB/s counts every input read once and every output written once, backward those of the gradients'
computation; `of_copy` is the share of a plain copy's bandwidth. Errors are relative (L2) to fp64 on 512 tokens, the
worst output or gradient. Needs a CUDA device. Prints a table and appends one JSON object a line to --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from farspan.launch.quiet import quiet_libraries
from farspan.models.compiled import compiled
from farspan.models.config import ModelConfig
from farspan.models.rotary import inverse_frequencies, rotate, rotation

CHECKED = 512  # tokens that are compared with fp64
LIGER = importlib.util.find_spec("liger_kernel") is not None
Function = Callable[..., Any]


@dataclass
class Op:
    """Differentiable inputs, further ones (`[tokens, ...]` too), and candidates; the first one is the definition."""

    name: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    candidates: dict[str, Function]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-3b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    quiet_libraries()
    torch.manual_seed(0)
    model = ModelConfig.model_validate({"preset": options.model})
    results = [measure(op, name) for op in operations(model, options.tokens) for name in op.candidates]
    report(results, f"{options.model}, {options.tokens:,} tokens", options.output)


def operations(model: ModelConfig, tokens: int) -> Iterator[Op]:
    from farspan.models.layers import rms_norm, silu_product  # imports Megatron

    hidden, inner, dim, epsilon = model.hidden_size, model.feed_forward_size, model.head_dim, model.norm_epsilon

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def candidates(function: Function, own: Function, liger: Function | None = None) -> dict[str, Function]:
        return {"plain": function, "compiled": own} | ({"liger": liger} if LIGER and liger else {})

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm.__wrapped__(x, weight, epsilon)  # type: ignore[attr-defined]

    def add_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return total, norm(total, weight)

    def two_kernels(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return total, rms_norm(total, weight, epsilon)

    def norm_rotate(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return rotate.__wrapped__(norm(x, weight), cosine, sine)  # type: ignore[attr-defined]

    def norm_then_rotate(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return rotate(rms_norm(x.flatten(0, -2), weight, epsilon).view_as(x), cosine, sine)

    def each(function: Function) -> Function:
        return lambda q, k, cosine, sine: (function(q, cosine, sine), function(k, cosine, sine))

    angles = rotation(torch.arange(tokens, device="cuda")[None], inverse_frequencies(dim, model.rotary_theta))
    turns = angles.cosine[0], angles.sine[0]
    q, k = normal(tokens, model.heads, dim), normal(tokens, model.kv_heads, dim)
    liger = Liger()
    yield Op("rms norm", (normal(tokens, hidden), normal(hidden)), (), candidates(
        norm, lambda x, weight: rms_norm(x, weight, epsilon), lambda x, weight: liger.norm(x, weight, epsilon)
    ))  # fmt: skip
    yield Op("add, rms norm", (normal(tokens, hidden), normal(tokens, hidden), normal(hidden)), (), candidates(
        add_norm, compiled(add_norm), lambda x, y, weight: liger.add_norm(x, y, weight, epsilon)
    ) | {"add, then compiled": two_kernels})  # fmt: skip
    yield Op("rotary of q and k", (q, k), turns, candidates(
        each(rotate.__wrapped__), each(rotate), liger.rotate  # type: ignore[attr-defined]
    ))  # fmt: skip
    yield Op("rms norm, rotary of q", (q, normal(dim)), turns, candidates(
        norm_rotate, compiled(norm_rotate)
    ) | {"two compiled": norm_then_rotate})  # fmt: skip
    yield Op("swiglu", (normal(tokens, inner), normal(tokens, inner)), (), candidates(
        silu_product.__wrapped__, silu_product, liger.silu_product  # type: ignore[attr-defined]
    ))  # fmt: skip


class Liger:
    """Liger-Kernel's functions with our arguments."""

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        normed, total = LigerFusedAddRMSNormFunction.apply(x, y, weight, epsilon, 0.0, "llama", False)
        return total, normed

    def rotate(self, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import LigerRopeFunction

        turned = LigerRopeFunction.apply(*(x[None].transpose(1, 2) for x in (q, k)), doubled(cosine), doubled(sine))
        return turned[0].transpose(1, 2).squeeze(0), turned[1].transpose(1, 2).squeeze(0)

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)


@cache
def doubled(angles: Tensor) -> Tensor:
    """`[tokens, 1, D / 2]` to `[1, tokens, D]`, as Liger wants it; once, as a model does it for all its layers."""
    return torch.cat((angles, angles), -1).transpose(0, 1)


def measure(op: Op, name: str) -> dict[str, Any]:
    function = op.candidates[name]

    def leaves() -> list[Tensor]:
        """Copies: Liger's functions write into what they are given, in both directions."""
        return [x.clone().requires_grad_() for x in op.inputs]

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = function(*leaves, *op.constants)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def graph() -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """For one backward pass: compiled functions give the graph's buffers away in it."""
        given = leaves()
        return forward(*given), given

    def backward(outputs: tuple[Tensor, ...], given: list[Tensor]) -> None:
        torch.autograd.grad(outputs, given, gradients)

    outputs, _ = graph()
    gradients = [torch.randn_like(x) for x in outputs]
    inputs, results = (sum(x.nbytes for x in tensors) for tensors in (op.inputs, outputs))
    constants = sum(x.nbytes for x in op.constants)
    del outputs
    forward_ms, backward_ms = milliseconds(forward, leaves), milliseconds(backward, graph)
    linear = op.name.startswith("rotary")
    # An output that is a sum of inputs only passes its gradient on.
    added = len(op.inputs) == 3  # both addends have one gradient
    read = results + constants + (0 if linear else inputs - added * op.inputs[0].nbytes)
    written = inputs - added * op.inputs[0].nbytes
    forward_rate = (inputs + constants + results) / forward_ms / 1e6
    backward_rate = (read + written) / backward_ms / 1e6
    return {
        "name": f"{op.name}: {name}",
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_gb_s": forward_rate,
        "backward_gb_s": backward_rate,
        "forward_of_copy": forward_rate / copy_rate(),
        "backward_of_copy": backward_rate / copy_rate(),
        "error": error(op, function),
    }


def error(op: Op, function: Function) -> float:
    """Worst of outputs and gradients, against the first candidate in fp64."""
    exact = next(iter(op.candidates.values()))

    def few(x: Tensor) -> Tensor:
        return x[:CHECKED] if x.dim() > 1 else x

    def results(f: Function, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [few(x).to(dtype or x.dtype, copy=True).requires_grad_() for x in op.inputs]
        outputs = f(*leaves, *(few(x).to(dtype or x.dtype) for x in op.constants))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        gradients = [torch.randn(x.shape, device=x.device).bfloat16().to(x.dtype) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    with exact_functions():
        wanted = results(exact, torch.float64)
    pairs = zip(results(function, None), wanted, strict=True)
    return max(float((got.detach().double() - exact).norm() / exact.norm()) for got, exact in pairs)


@contextmanager
def exact_functions() -> Iterator[None]:
    """What is computed in fp32 on purpose is computed in fp64."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        yield


def copy_rate(cache: list[float] = []) -> float:  # noqa: B006
    """GB/s of a copy of 1 GiB, measured once."""
    if not cache:
        x = torch.empty(2**29, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
        cache.append(2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e6)
    return cache[0]


def milliseconds(
    function: Callable[..., Any], prepare: Callable[[], Sequence[Any]] = tuple, repeats: int = 20
) -> float:
    """Median of single calls after three to warm up; `prepare` makes the arguments of each, and is not timed."""
    times = []
    for _ in range(3 + repeats):
        arguments = prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def report(results: list[dict[str, Any]], title: str, output: Path | None) -> None:
    """The table, one line a result, and the same as JSON lines."""
    device = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    if output:
        with output.open("a") as file:
            file.writelines(json.dumps({"what": title, "device": device, **result}) + "\n" for result in results)
    keys = [key for key in results[0] if key != "name"]
    print(f"\n{title}, {device}")
    print(f"{'':44}" + "".join(f"{key:>17}" for key in keys))
    for result in results:
        print(f"{result['name']:44}" + "".join(f"{result[key]:17.4g}" for key in keys))


if __name__ == "__main__":
    main()
