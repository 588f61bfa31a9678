"""The layers of the decoder, on Megatron Core's tensor-parallel linears.

Hidden states are `[tokens, hidden]`, tokens being batch x slots; under sequence parallelism a tensor rank holds
tokens / tensor of them outside attention and feed-forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from farspan.kernels import accumulation_dtype
from farspan.models.compiled import compiled


@dataclass(frozen=True)
class Sharding:
    """How layers are divided over the tensor group, and the seed that all their initial weights come from."""

    tensor: int = 1
    sequence_parallel: bool = False
    seed: int = 0

    def megatron(self) -> ModelParallelConfig:
        # The whole matrix is drawn on the CPU and cut, so that initial weights do not depend on the tensor degree.
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.sequence_parallel,
            use_cpu_initialization=True,
            params_dtype=torch.float32,
            deterministic_mode=True,
        )

    def normal(self, name: str, std: float) -> Callable[[Tensor], Tensor]:
        """Draws a weight from its own generator: the same whatever is drawn before it, and on whichever rank."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1

        def draw(weight: Tensor) -> Tensor:
            return weight.normal_(0, std, generator=torch.Generator().manual_seed(seed))

        return draw


@compiled
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / rms(x) * weight` of each row of `[rows, size]`; in fp32 or fp64, then in x's dtype (arXiv:1910.07467)."""
    wide = x.to(accumulation_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide.to(x.dtype) * weight


@compiled
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return nn.functional.silu(gate) * up


class RMSNorm(nn.Module):
    """`rms_norm` over the last dim.

    With `partial` each tensor rank sees only a part of what the weight acts on (its own heads, or its own tokens), so
    the weight's gradient is summed over the tensor group; otherwise the copies of the weight would drift apart.
    """

    def __init__(self, size: int, epsilon: float, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon, self.partial = epsilon, partial

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.partial else self.weight
        return rms_norm(x.flatten(0, -2), weight, self.epsilon).view_as(x)


def column_linear(
    name: str, inputs: int, outputs: int, std: float, sharding: Sharding, bias: bool = False
) -> ColumnParallelLinear:
    """A linear whose outputs are divided over the tensor group."""
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=sharding.megatron(),
        init_method=sharding.normal(name, std),
        bias=bias,
        gather_output=False,
    )


def row_linear(name: str, inputs: int, outputs: int, std: float, sharding: Sharding) -> RowParallelLinear:
    """A linear whose inputs are divided over the tensor group; its outputs are summed over it."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=sharding.megatron(),
        init_method=sharding.normal(name, std),
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, name: str, hidden: int, inner: int, std: float, out_std: float, sharding: Sharding) -> None:
        super().__init__()
        self.gate = column_linear(f"{name}.gate", hidden, inner, std, sharding)
        self.up = column_linear(f"{name}.up", hidden, inner, std, sharding)
        self.down = row_linear(f"{name}.down", inner, hidden, out_std, sharding)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x)[0], self.up(x)[0]
        return self.down(silu_product(gate, up))[0]
