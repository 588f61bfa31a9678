"""One worker's life: process group, mesh, model, engine, resume, loop, farewell."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from farspan.models.config import ModelConfig
from farspan.models.decoder import Decoder
from farspan.models.layers import Sharding
from farspan.models.offload import HostMemory
from farspan.models.recompute import Recomputation, on_device
from farspan.parallel.mesh import Mesh
from farspan.trainer.callbacks.evaluation import Evaluation
from farspan.trainer.callbacks.keeping import Keeping
from farspan.trainer.callbacks.mixture import Mixture
from farspan.trainer.callbacks.recording import Recording
from farspan.trainer.callbacks.saving import Saving
from farspan.trainer.callbacks.sparseness import Sparseness
from farspan.trainer.checkpoint.state import RunState
from farspan.trainer.checkpoint.store import CheckpointStore, Found
from farspan.trainer.checkpoint.weights import begin_with
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.config_file import dump_config
from farspan.trainer.engine import Engine
from farspan.trainer.feed import Feed
from farspan.trainer.preflight import Preflight, check
from farspan.trainer.process_group import start_process_group
from farspan.trainer.row_length import narrower_contexts
from farspan.trainer.run_lock import RunLock
from farspan.trainer.stop import StopRequest
from farspan.trainer.summary import describe_changes, describe_start, summarize
from farspan.trainer.trainer import Callback, Trainer


def run(config: RunConfig, resume: bool = True) -> None:
    """Trains as the rank that RANK and WORLD_SIZE name (a worker of `farspan train` or torchrun), to the end.

    With `resume` the run goes on from its newest valid checkpoint, if it has one; without, a run directory that has
    checkpoints is refused.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    preflight = check(config, world)
    lock = RunLock(config.run.dir)
    if rank == 0:
        lock.acquire()
    device = start_process_group(config.parallel.timeout_seconds)
    # Handlers only now: a rank that waits for others, one of which was refused the lock, must end on SIGTERM.
    with StopRequest() as stop:
        outer_link = config.parallel.inner is not None
        mesh = Mesh.create(preflight.degrees, device, outer_link, narrower_contexts(config))
        try:
            train_on(mesh, config, preflight, stop, resume, _reporter(rank))
        finally:
            mesh.destroy()
            dist.destroy_process_group()
            lock.release()


def train_on(
    mesh: Mesh, config: RunConfig, preflight: Preflight, stop: StopRequest, resume: bool, report: Callable[[str], None]
) -> None:
    """Trains on a mesh that exists; collective over all its ranks. `report` gets lines on every rank."""
    directory, leads = config.run.dir, dist.get_rank() == 0
    store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep)
    state = RunState(store, config, preflight.model, mesh.degrees, preflight.prepared)
    found = _find_checkpoint(store, state, mesh, resume)
    _seed(config.run.seed)
    model = build_model(config, preflight.model, mesh)
    if config.run.weights_from is not None and found is None:
        begin_with(config.run.weights_from, model.to(mesh.device), mesh, preflight.prepared.tokenizer_digest, report)
    if leads:
        describe_changes(directory / "config.yaml", config, report)
        (directory / "config.yaml").write_text(dump_config(config))
    feed = Feed(config, preflight.model, preflight.rows, mesh)
    engine = Engine(config, mesh, model)
    callbacks: list[Callback] = []
    if config.memory.keep_layers == "auto":  # the first of all, for it looks at the memory of training alone
        callbacks.append(Keeping(model, report))
    callbacks.append(Evaluation(config.eval.every))
    recording = Recording(directory, found.step if found else 0, report) if leads else None
    if feed.sparse is not None:
        callbacks.append(Sparseness(feed.sparse, recording))
    if config.data.blend is not None:
        callbacks.append(Mixture(feed.steps))
    if recording is not None:
        callbacks.append(recording)
    callbacks.append(Saving(state, config.checkpoint.every, report))
    trainer = Trainer(config, mesh, engine, feed, callbacks)
    if found is not None:
        state.resume(trainer, found, report)
    if not trainer.last_step:
        feed.look_ahead(trainer.step)
    first = min(trainer.step, config.train.steps - 1)  # of a run that is complete there is no next step
    describe_start(config, preflight, feed, first, report)
    report(f"plan of the first batch verified: digest {feed.verify_plans(first)}")
    trainer.train(stop)
    if recording is not None:
        recording.close()
        summarize(config, trainer.stopping, store, report)
    feed.close()
    engine.close()


def build_model(config: RunConfig, model: ModelConfig, mesh: Mesh) -> Decoder:
    """The decoder with its initial weights; `model` is the configuration's, with its vocabulary known."""
    memory = config.memory
    keep = HostMemory(mesh.device).layer if memory.offload else on_device
    return Decoder(
        model,
        Sharding(mesh.degrees.tensor, config.parallel.sequence_parallel, config.run.seed),
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        backend=config.attention.backend,
        recomputation=Recomputation(memory.recompute, keep, memory.keep_layers_at_first),
    )


def _find_checkpoint(store: CheckpointStore, state: RunState, mesh: Mesh, resume: bool) -> Found | None:
    found = store.newest_valid(mesh.control)
    if found is None and any(store.directory.glob("*.damaged*")):
        raise ConfigError(
            f"all checkpoints in {store.directory} are damaged and set aside; to start anew, choose another run.dir"
        )
    if found is not None:
        if not resume:
            raise ConfigError(f"{store.directory} has checkpoints; resume the run, or choose another run.dir")
        state.check(found)
    return found


def _reporter(rank: int) -> Callable[[str], None]:
    def report(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    return report


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
