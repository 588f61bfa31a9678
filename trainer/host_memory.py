"""Whether the host has the memory that `memory.offload` moves tensors to."""

from __future__ import annotations

from pathlib import Path

from farspan.models import offload
from farspan.parallel.degrees import Degrees
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import ConfigError, RunConfig


def check_host_memory(config: RunConfig, degrees: Degrees, processes: int) -> None:
    """ConfigError when this host's `processes` would offload more than it has available."""
    if not config.memory.offload:
        return
    needed, available = processes * offloaded_bytes(config, degrees), available_bytes()
    if needed > available:
        divide = degrees.tensor > 1 and not config.parallel.sequence_parallel
        raise ConfigError(
            f"memory.offload needs {needed / 2**30:.1f} GiB of this host's memory for {processes} processes, and "
            f"{available / 2**30:.1f} GiB are available; set memory.recompute to full, "
            f"{'set parallel.sequence_parallel to true, ' if divide else ''}raise memory.keep_layers, or lower "
            "train.sequence_length or train.micro_batch_rows"
        )


def offloaded_bytes(config: RunConfig, degrees: Degrees) -> int:
    """Pinned memory of one process: layers x tokens of the rank x bytes kept of a token, in whole pages.

    Layers are those that are computed again, less the last, which stays on the device. Of a token each keeps its input,
    and with `memory.recompute: selective` attention's out, and lse in fp32. Tensor ranks divide the heads, but keep a
    copy of the input each, unless `parallel.sequence_parallel` divides that too. Ranks of one host share nothing.
    """
    train, model, tensor = config.train, config.model, degrees.tensor
    size = {"bf16": 2, "fp32": 4}[train.dtype]
    order = Arrangement(config, degrees.context).order()
    tokens = order.slots * train.micro_batch_rows
    tensors = [tokens * model.hidden_size * size // (tensor if config.parallel.sequence_parallel else 1)]
    if config.memory.recompute == "selective":
        tensors += [tokens * heads * model.heads // tensor for heads in (model.head_dim * size, 4)]
    layers = max(0, model.layers - config.memory.keep_layers_at_first - 1)
    return layers * offload.PAGE_BYTES * sum(-(-x // offload.PAGE_BYTES) for x in tensors)


def available_bytes() -> int:
    """What programs can still allocate without swapping, and no more than this container may have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; absent where nothing limits
    words = limit.read_text().strip() if limit.exists() else "max"
    return available if words == "max" else min(available, int(words))
