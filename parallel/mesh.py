"""The mesh: how processes are divided among data, context and tensor parallelism, with groups named by purpose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class MeshError(ValueError):
    """The number of processes cannot be divided as the configuration asks."""


@dataclass(frozen=True)
class Degrees:
    """How many ways each axis is split. Ranks count tensor first, then context, then data."""

    data: int
    context: int
    tensor: int

    @property
    def world(self) -> int:
        return self.data * self.context * self.tensor

    @property
    def shard(self) -> int:
        """Ranks that share optimizer state, and over which gradients are summed."""
        return self.data * self.context

    @classmethod
    def divide(cls, world: int, context: int, tensor: int) -> Degrees:
        """The data degree that is left of `world` processes; MeshError, with the nearest possible degrees, if none is."""
        if min(world, context, tensor) < 1:
            raise MeshError(
                f"processes {world}, parallel.context {context} and parallel.tensor {tensor} must be 1 or more"
            )
        if world % (context * tensor):
            raise MeshError(
                f"{world} processes cannot be divided into parallel.context {context} x parallel.tensor {tensor}; "
                f"possible are {_nearest(world, context, tensor)}"
            )
        return cls(world // (context * tensor), context, tensor)

    def __str__(self) -> str:
        return f"data {self.data} x context {self.context} x tensor {self.tensor}"


def _nearest(world: int, context: int, tensor: int) -> str:
    below = world // (context * tensor) * context * tensor
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    pairs = [(c, t) for t in divisors for c in divisors if world % (c * t) == 0]
    pairs.sort(key=lambda pair: (abs(pair[1] - tensor) + abs(pair[0] - context), pair[1] != tensor))
    choices = [f"context {c} x tensor {t}" for c, t in pairs[:3]]
    counts = [str(n) for n in (below, below + context * tensor) if n]
    return f"{', '.join(choices)} with {world} processes, or these degrees with {' or '.join(counts)} processes"


@dataclass(frozen=True, eq=False)
class Mesh:
    """The process groups of this rank, on Megatron Core's parallel state.

    `batch`: who reads different data. `loss`: data x context, over which loss and gradients are summed. `shard`: who
    shares optimizer state (the same ranks as `loss`). `context`: who shares a sequence. `tensor`: who shares layers.
    `control`: all ranks, on gloo, for agreements between hosts that must not touch a GPU.
    """

    degrees: Degrees
    device: torch.device
    batch: dist.ProcessGroup
    loss: dist.ProcessGroup
    shard: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor: dist.ProcessGroup
    control: dist.ProcessGroup

    @classmethod
    def create(cls, degrees: Degrees, device: torch.device) -> Mesh:
        """Collective over all ranks of the default process group, which must exist."""
        if dist.get_world_size() != degrees.world:
            raise MeshError(
                f"{degrees} is a mesh of {degrees.world} processes, but {dist.get_world_size()} were started"
            )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degrees.tensor,
            context_parallel_size=degrees.context,
            create_gloo_process_groups=False,
        )
        loss = parallel_state.get_data_parallel_group(with_context_parallel=True)
        mesh = cls(
            degrees=degrees,
            device=device,
            batch=parallel_state.get_data_parallel_group(with_context_parallel=False),
            loss=loss,
            shard=loss,
            context=parallel_state.get_context_parallel_group(),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            control=dist.new_group(backend="gloo"),
        )
        # A communicator is made at its first collective, in which all its ranks must take part; pairs of them would hang.
        for group in (mesh.loss, mesh.context, mesh.tensor):
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        return mesh

    @property
    def data_rank(self) -> int:
        return self.batch.rank()

    @property
    def context_rank(self) -> int:
        return self.context.rank()

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    def destroy(self) -> None:
        """Forgets the groups, so that another mesh can be made in this process."""
        parallel_state.destroy_model_parallel()
