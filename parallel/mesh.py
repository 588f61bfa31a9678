"""The mesh: how processes are divided among data, context and tensor parallelism, with groups named by purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from farspan.parallel.degrees import Degrees, MeshError
from farspan.parallel.plan import LINKS
from farspan.parallel.streams import transfer_options


@dataclass(frozen=True, eq=False)
class Mesh:
    """The process groups of this rank, on Megatron Core's parallel state.

    `batch`: who reads different data. `loss`: data x context, over which loss and gradients are summed. `shard`: who
    shares optimizer state (the same ranks as `loss`). `context`: who shares a sequence. `tensor`: who shares layers.
    `control`: all ranks, on gloo, for agreements between hosts that must not touch a GPU. `links`: for each link of a
    plan's moves the group that carries them; all are of the context ranks. `narrower` has a mesh of the same ranks for
    each smaller context degree that was asked for: batch, context and links differ, and all else is shared.
    """

    degrees: Degrees
    device: torch.device
    batch: dist.ProcessGroup
    loss: dist.ProcessGroup
    shard: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor: dist.ProcessGroup
    control: dist.ProcessGroup
    links: dict[str, dist.ProcessGroup]
    narrower: Mapping[int, Mesh] = field(default_factory=dict)

    @classmethod
    def create(
        cls, degrees: Degrees, device: torch.device, outer_link: bool = False, narrower: Sequence[int] = ()
    ) -> Mesh:
        """Collective over all ranks of the default process group, which must exist; all groups have its timeout.

        With `outer_link`, hops between nodes have a communicator of their own: on one they would queue with inner hops.
        `narrower` are further context degrees, divisors of that of `degrees`.
        """
        if dist.get_world_size() != degrees.world:
            raise MeshError(
                f"{degrees} is a mesh of {degrees.world} processes, but {dist.get_world_size()} were started"
            )
        timeout = _timeout(device)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degrees.tensor,
            context_parallel_size=degrees.context,
            create_gloo_process_groups=False,
            high_priority_stream_groups=["cp"] if device.type == "cuda" else None,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
        )
        loss = parallel_state.get_data_parallel_group(with_context_parallel=True)
        context = parallel_state.get_context_parallel_group()
        outer = _new_group(degrees.context_groups(), device) if outer_link else context
        mesh = cls(
            degrees=degrees,
            device=device,
            batch=parallel_state.get_data_parallel_group(with_context_parallel=False),
            loss=loss,
            shard=loss,
            context=context,
            tensor=parallel_state.get_tensor_model_parallel_group(),
            control=dist.new_group(backend="gloo", timeout=timeout),
            links=dict.fromkeys(LINKS, context) | {"outer": outer},
        )
        mesh = replace(mesh, narrower={context: mesh._narrowed(context, outer_link) for context in narrower})
        transfers = [group for each in (mesh, *mesh.narrower.values()) for group in (each.context, each.links["outer"])]
        # A communicator is made at its first collective, in which all its ranks must take part; two alone would hang.
        for group in (mesh.loss, mesh.tensor, *transfers):
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        return mesh

    def with_context(self, context: int) -> Mesh:
        """The mesh of this context degree, which is its own or one of `narrower`."""
        return self if context == self.degrees.context else self.narrower[context]

    def _narrowed(self, context: int, outer_link: bool) -> Mesh:
        """Collective: neighbours among the ranks that share a sequence here share one there."""
        degrees, device = self.degrees.with_context(context), self.device
        group = _new_group(degrees.context_groups(), device)
        outer = _new_group(degrees.context_groups(), device) if outer_link else group
        batch = _new_group(degrees.batch_groups(), device)
        return replace(
            self, degrees=degrees, batch=batch, context=group, links=dict.fromkeys(LINKS, group) | {"outer": outer}
        )

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


def _timeout(device: torch.device) -> timedelta:
    """How long operations of the default group may take; torch has no public name for it."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD._get_backend(device).options._timeout


def _new_group(groups: list[list[int]], device: torch.device) -> dist.ProcessGroup:
    """A new group of the ranks with which this one is in `groups`; all ranks make all of these, in one order."""
    timeout, options = _timeout(device), transfer_options(device)
    made = [dist.new_group(ranks, timeout, pg_options=options) for ranks in groups]
    return next(group for ranks, group in zip(groups, made, strict=True) if dist.get_rank() in ranks)
