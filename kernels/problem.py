"""What is known of an attention before its tensors exist: all but the mask that decides who can compute it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call of `attend` or `attend_backward`: shapes, dtype, GPU, direction, and where results go.

    `capability` is the GPU's compute capability, such as (9, 0); None on a CPU.
    `accumulate`: whether results go into those of other calls. `out_given`: whether a backward call gets the global
    out itself, and not its delta alone. `index_block`: the side of the tiles that an index selects; None without.
    """

    batch: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    capability: tuple[int, int] | None
    backward: bool = False
    accumulate: bool = False
    out_given: bool = True
    index_block: int | None = None

    @property
    def sparse(self) -> bool:
        return self.index_block is not None

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        backward: bool = False,
        accumulate: bool = False,
        out_given: bool = True,
        index_block: int | None = None,
    ) -> Problem:
        (batch, _, heads, dim), (_, keys, kv_heads, value_dim) = q.shape, v.shape
        shape = (batch, keys, heads, kv_heads, dim, value_dim, q.dtype, capability(q.device))
        return Problem(*shape, backward, accumulate, out_given, index_block)

    def results(self, rows: int, keys: int) -> int:
        """Elements that a call over so many rows and keys returns: those of out, or of dq, dk and dv."""
        if not self.backward:
            return self.batch * rows * self.heads * self.value_dim
        of_keys = keys * self.kv_heads * (self.head_dim + self.value_dim)
        return self.batch * (rows * self.heads * self.head_dim + of_keys)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
