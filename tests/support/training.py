"""Whole training runs on the ranks of a pool."""

from __future__ import annotations

from typing import Any

import torch

from farspan.trainer.config import RunConfig


def small_model(layers: int) -> dict[str, Any]:
    """The `model` section of a decoder that trains in seconds."""
    return {
        "hidden_size": 32,
        "layers": layers,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "feed_forward_size": 48,
    }


def train_runs(rank: int, world: int, configs: list[RunConfig]) -> list[list[dict[str, Any]]]:
    """Trains each configuration in turn on all ranks of the pool; rank 0 returns the rows of metrics.jsonl."""
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.parallel.mesh import Mesh
    from farspan.trainer.metrics import MetricsFile
    from farspan.trainer.preflight import check
    from farspan.trainer.row_length import narrower_contexts
    from farspan.trainer.stop import StopRequest
    from farspan.trainer.train import train_on

    results = []
    for config in configs:
        if rank == 0:
            config.run.dir.mkdir(parents=True, exist_ok=True)  # there is one when it resumes
        preflight = check(config, world)
        mesh = Mesh.create(preflight.degrees, torch.device("cpu"), narrower=narrower_contexts(config))
        train_on(mesh, config, preflight, StopRequest(), True, lambda line: None)
        mesh.destroy()
        results.append(MetricsFile(config.run.dir / "metrics.jsonl").read() if rank == 0 else [])
    return results
