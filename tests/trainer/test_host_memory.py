"""What offloading needs of the host is known before a run starts."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.corpus import prepare_small
from support.pool import Pool

from farspan.models import offload
from farspan.parallel.degrees import Degrees
from farspan.trainer import host_memory
from farspan.trainer.config import ConfigError, RunConfig

GIB = 2**30


def small(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Two micro-batches of two rows, three layers whose tensors fill no whole number of small pages."""
    shapes = {"hidden_size": 36, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 10, "feed_forward_size": 48}
    train = {"steps": 1, "sequence_length": 101, "tokens_per_step": 404, "micro_batch_rows": 2, "dtype": "fp32"}
    data = {"sources": ["unused"], "directory": str(folder / "prepared")}
    return RunConfig.model_validate({"model": shapes, "data": data, "train": train, "eval": {"rows": 2}, **sections})


def qwen(parallel: dict[str, Any] | None = None, **memory: Any) -> RunConfig:
    """One row of 2**20 tokens."""
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"preset": "qwen2.5-3b"},
            "data": {"sources": ["unused"], "directory": "unused"},
            "train": {"steps": 1, "sequence_length": 2**20, "tokens_per_step": 2**20},
            "parallel": parallel or {"context": 8},
            "memory": {"offload": True, **memory},
        }
    )


def pages_used(rank: int, world: int, config: RunConfig, degrees: Degrees) -> int:
    """Trains a step on a CPU; the pages that it was given."""
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.models.offload import HostMemory
    from farspan.parallel.mesh import Mesh
    from farspan.trainer import train
    from farspan.trainer.preflight import check
    from farspan.trainer.stop import StopRequest

    on_a_cpu = config.model_copy(update={"memory": config.memory.model_copy(update={"offload": False})})
    preflight = check(on_a_cpu, world)
    mesh = Mesh.create(degrees, torch.device("cpu"))
    host = HostMemory(mesh.device)
    if rank == 0:
        config.run.dir.mkdir()
    with mock.patch.object(offload, "PAGE_BYTES", 4096), mock.patch.object(train, "HostMemory", return_value=host):
        train.train_on(mesh, config, preflight, StopRequest(), True, lambda line: None)
    mesh.destroy()
    return host.pages


@pytest.mark.distributed
def test_it_is_what_a_step_takes(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_small(tmp_path)
    monkeypatch.setattr(offload, "PAGE_BYTES", 4096)
    for number, ((context, tensor), mode, kept) in enumerate(product([(2, 1), (1, 2)], ("full", "selective"), (0, 1))):
        config = small(
            tmp_path,
            run={"dir": str(tmp_path / f"run{number}")},
            memory={"recompute": mode, "offload": True, "keep_layers": kept},
            parallel={"context": context, "tensor": tensor},
        )
        degrees = Degrees.divide(2, context, tensor)
        needed = host_memory.offloaded_bytes(config, degrees)
        assert pool.run(2, pages_used, config, degrees) == [needed // 4096] * 2
        assert needed > 0


def test_shapes_of_a_long_row() -> None:
    degrees = Degrees.divide(8, 8, 1)
    stream = 2**17 * 2048 * 2
    both = 2 * stream + offload.PAGE_BYTES  # lse fills half a page
    assert host_memory.offloaded_bytes(qwen(recompute="full"), degrees) == 35 * stream
    assert host_memory.offloaded_bytes(qwen(), degrees) == 35 * both
    assert host_memory.offloaded_bytes(qwen(keep_layers=30), degrees) == 5 * both
    assert host_memory.offloaded_bytes(qwen(keep_layers=36), degrees) == 0


def test_tensor_ranks_divide_the_heads_and_their_tokens_only_under_sequence_parallelism() -> None:
    def gib(**parallel: Any) -> float:
        return host_memory.offloaded_bytes(qwen(parallel=parallel), Degrees.divide(2, 1, 2)) / GIB

    lse = 2**20 * 8 * 4 / GIB
    assert gib(context=1, tensor=2) == 35 * (4 + 2 + lse)
    assert gib(context=1, tensor=2, sequence_parallel=True) == 35 * (2 + 2 + lse)


def test_too_much_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    degrees = Degrees.divide(8, 8, 1)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 288 * GIB)
    host_memory.check_host_memory(qwen(), degrees, 8)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 280 * GIB)
    host_memory.check_host_memory(qwen(recompute="full"), degrees, 8)
    host_memory.check_host_memory(qwen(offload=False), degrees, 8)
    host_memory.check_host_memory(qwen(), degrees, 4)  # half of the ranks are on another host
    with pytest.raises(ConfigError) as caught:
        host_memory.check_host_memory(qwen(), degrees, 8)
    assert str(caught.value) == (
        "memory.offload needs 284.4 GiB of this host's memory for 8 processes, and 280.0 GiB are available; set "
        "memory.recompute to full, raise memory.keep_layers, or lower train.sequence_length or train.micro_batch_rows"
    )
    with pytest.raises(
        ConfigError, match=r"to full, set parallel\.sequence_parallel to true, raise memory\.keep_layers"
    ):
        host_memory.check_host_memory(qwen(parallel={"tensor": 2}), Degrees.divide(2, 1, 2), 2)


def test_what_this_host_has() -> None:
    assert 0 < host_memory.available_bytes() < 2**50
