"""`farspan doctor`: what this machine has, which attention backends run on it, and which a configuration will use."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from farspan.kernels import rates
from farspan.kernels.backends import REGISTRY
from farspan.kernels.problem import Problem
from farspan.parallel.degrees import Degrees, MeshError
from farspan.parallel.prepare import prepare
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.describe_backends import attention_problem, describe_backends
from farspan.trainer.first_rows import first_rows
from farspan.trainer.plan_choice import build_plan, plan_names
from farspan.trainer.row_length import for_rows

Report = Callable[[str], None]
Capability = tuple[int, int]

_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "flash-attn-4")
# Ranks that are looked at, evenly from the first to the last: all 64 of a million tokens would take minutes.
_RANKS = 4
_DRIVER = Path("/proc/driver/nvidia/version")
# What backends are asked about without a configuration: the heads of most models of today.
_USUAL = Problem(1, 32768, 32, 8, 128, 128, torch.bfloat16, None)


def examine(config: RunConfig | None, processes: int, gpu: Capability | None, report: Report) -> None:
    """Versions, devices, backends, the table of rates; with a configuration also who computes its first batch.

    `gpu` is the compute capability of a GPU to speak of instead of the one here. ConfigError where the configuration
    cannot run.
    """
    for name, found in _versions():
        report(f"{name:<14}{found}")
    for line in _devices():
        report(f"{'device':<14}{line}")
    at_hand = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    capability = gpu or at_hand
    tensors = attention_problem(config, capability) if config else replace(_USUAL, capability=capability)
    where = "here" if capability == at_hand else f"on {_sm(gpu)}"
    report(f"{'attention':<14}of {_dtype(tensors)} with head dim {tensors.head_dim}, {where}:")
    for name, backend in REGISTRY.items():
        report(f"{'':<14}{backend.refusal(tensors) or f'{name} can run'}")
    report(f"{'auto':<14}{_table(capability, where)}")
    if config is not None:
        _describe_batch(config, processes, tensors, report)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "cuda", torch.version.cuda or "none: torch was built for CPUs"
    if _DRIVER.exists():
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text())
        yield "driver", found[0] if found else "unknown"
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        yield "nccl", ".".join(map(str, torch.cuda.nccl.version()))


def _devices() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} {device.name}, {device.total_memory / 2**30:.1f} GiB, {_sm((device.major, device.minor))}"
    if not torch.cuda.device_count():
        yield f"no GPU; {torch.get_num_threads()} CPU threads"


def _table(capability: Capability | None, where: str) -> str:
    """What `auto` chooses by."""
    if capability is None:
        return "means reference here, for there is no GPU"
    table = rates.of_capability(capability)
    line = f"chooses by what was measured on {table.device} ({table.name}, torch {table.torch}, triton {table.triton})"
    device = torch.cuda.get_device_name() if where == "here" else None
    if table.name != _sm(capability) or device not in (None, table.device):
        line += f"; {device or _sm(capability)} may rank them otherwise, which benchmarks/rates.py measures"
    return line


def _describe_batch(config: RunConfig, processes: int, tensors: Problem, report: Report) -> None:
    config = for_rows(config, config.train.sequence_length)
    parallel = config.parallel
    try:
        degrees = Degrees.divide(processes, parallel.context, parallel.tensor)
    except MeshError as error:
        raise ConfigError(str(error)) from error
    arrangement = Arrangement(config, degrees.context)
    rows, words = first_rows(config)
    order, named = arrangement.order(rows), plan_names(config, arrangement, rows)
    report(f"{'batch':<14}{words}")
    ranks = sorted({i * (order.world - 1) // (_RANKS - 1) for i in range(_RANKS)})
    where = f"context rank {', '.join(map(str, ranks))} of {order.world}"
    for seen, mask in arrangement.masks(rows).items():
        layer = "one layer" if len(named) == 1 else f"one layer that sees {seen.in_words}"
        report(f"{'pieces':<14}of {layer} on {where}, with attention.backend {config.attention.backend}:")
        plan = build_plan(config, named[seen].name, order, mask)
        prepared = (prepare(plan, order, mask, rank) for rank in ranks)
        for line in describe_backends(prepared, tensors, config.attention.backend):
            report(f"{'':<14}{line}")


def _dtype(tensors: Problem) -> str:
    return "bf16" if tensors.dtype == torch.bfloat16 else "fp32"


def _sm(capability: Capability | None) -> str:
    return "a CPU" if capability is None else f"sm_{capability[0]}{capability[1]}"
