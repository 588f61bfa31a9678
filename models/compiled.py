"""Element-wise functions as one kernel each, without the passes over memory that their single operators would make."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compiles a function of tensors for GPUs. On a CPU it runs as it is written: compiling would need a C++ compiler.

    The first argument's dim 0 is of any size, and so is that of other tensors of its size: their tokens. For all other
    sizes there is a kernel each.
    """

    @cache
    def kernel() -> Callable[..., Result]:
        # A kernel for each width, dtype and mode of autograd; torch would give up at the ninth.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        return torch.compile(function, fullgraph=True)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        tensors = [x for x in args if isinstance(x, Tensor) and x.dim()]
        if not tensors[0].is_cuda:
            return function(*args, **kwargs)
        for x in tensors:
            if len(x) == len(tensors[0]):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return kernel()(*args, **kwargs)

    return call
