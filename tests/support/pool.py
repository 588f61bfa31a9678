"""A pool of gloo processes that lives as long as the test run: starting processes is what takes the time."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class PoolError(AssertionError):
    """A case failed on some rank; the message is that rank's traceback."""


class Pool:
    """Runs `function(rank, world, *arguments)` on `world` ranks with a fresh gloo group; returns all ranks' results."""

    def __init__(self, timeout: float = 240) -> None:
        self.timeout = timeout
        self.workers: list[tuple[Any, Connection]] = []
        self.stores = tempfile.TemporaryDirectory()
        self.cases = 0

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        while len(self.workers) < world:
            self._start()
        self.cases += 1
        store = str(Path(self.stores.name) / f"store{self.cases}")
        for rank, (_, pipe) in enumerate(self.workers[:world]):
            pipe.send((function.__code__.co_filename, function.__qualname__, rank, world, store, arguments))
        results: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world])}
        while len(results) < world:
            ready = wait([pipe for pipe, rank in pipes.items() if rank not in results], self.timeout)
            failure = None if ready else f"no answer within {self.timeout} s from {world - len(results)} ranks"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                results[pipes[pipe]] = value
                failure = failure if ok else f"rank {pipes[pipe]} of {world}:\n{value}"
            if failure is not None:
                self.close()  # The other ranks may wait for the failed one for ever.
                raise PoolError(failure)
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
        process.start()
        theirs.close()
        self.workers.append((process, ours))


def _serve(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pool is for the CPU, also on a machine with GPUs
    torch.set_num_threads(1)
    modules: dict[str, Any] = {}
    while True:
        try:
            file, name, rank, world, store, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                modules[file] = _load(file)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=180)
            )
            dist.barrier()  # a rank that is done before another has connected would close the connection on it
            pipe.send((True, getattr(modules[file], name)(rank, world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"pool_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
