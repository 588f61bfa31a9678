"""The mesh: how processes are divided among data, context and tensor parallelism, with groups named by purpose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from farspan.parallel.degrees import Degrees, MeshError


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
        # A communicator is made at its first collective, in which all its ranks must take part; two alone would hang.
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
