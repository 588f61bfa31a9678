"""The DeepSpeed engine over Megatron's layers: ZeRO shards over data x context ranks, not over tensor ranks."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.models.decoder import Decoder, DecoderInput
from farspan.parallel.mesh import Mesh
from farspan.trainer.checkpoint.reshard import load_divided_anew
from farspan.trainer.config import RunConfig
from farspan.trainer.deepspeed_config import engine_config
from farspan.trainer.sections import OptimizerSection


class ModelParallelUnit:
    """Megatron's groups under DeepSpeed's names for them; its data-parallel group holds the context ranks too."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.shard

    def get_data_parallel_rank(self) -> int:
        return self._mesh.shard.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.shard.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tensor

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class Engine:
    """One optimizer step at a time: `backward` for each micro-batch, then `step`."""

    def __init__(self, config: RunConfig, mesh: Mesh, model: Decoder) -> None:
        import deepspeed
        from deepspeed.ops import __compatible_ops__

        # DeepSpeed would compile this C++ op at first use on a CPU, which needs a compiler and two minutes.
        __compatible_ops__["deepspeed_shm_comm"] = False
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.optimizer),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.epsilon,
            fused=mesh.device.type == "cuda",
        )
        self._mesh, self._stage, self._settings = mesh, config.parallel.zero_stage, config.optimizer
        with redirect_stdout(io.StringIO()):  # its reports of memory, meant for its own developers
            self._engine, *_ = deepspeed.initialize(
                model=model.to(mesh.device),
                optimizer=self._optimizer,
                config=engine_config(config, mesh.degrees),
                mpu=ModelParallelUnit(mesh),
                dist_init_required=False,
            )

    def forward(self, batch: DecoderInput) -> tuple[Tensor, Tensor]:
        """The sum of this rank's token losses, fp64, and each of them, `[rows, slots]`, which has no gradient."""
        total, losses = self._engine(batch)
        return total, losses

    def backward(self, objective: Tensor, last: bool) -> None:
        """Adds the gradients of one micro-batch; `last` says that the optimizer steps after it."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(objective, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Clips and steps; returns the norm of the whole gradient before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # At stage 0 DeepSpeed does not keep the norm, and its step clears the gradients.
        norm = self._unsharded_norm() if self._stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def training(self, mode: bool) -> None:
        self._engine.train(mode)

    def save(self, directory: str) -> None:
        """Collective: weights and optimizer state of all ranks, below `directory`."""
        self._engine.save_checkpoint(directory, tag="engine", client_state={}, save_latest=False)

    def load(self, directory: str, ranks: int) -> None:
        """Collective: what `save` wrote with `ranks` data x context ranks, at the same tensor degree and ZeRO stage.

        On as many ranks the state is the same bit for bit, and so it is, but divided anew, on any other number.
        """
        with redirect_stdout(io.StringIO()):  # the names of its own functions
            if self._stage > 0 and ranks != self._mesh.degrees.shard:
                load_divided_anew(self._engine, Path(directory, "engine"), self._mesh.tensor_rank, self._stage, ranks)
                return
            path, _ = self._engine.load_checkpoint(directory, tag="engine")
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {directory}")
        # DeepSpeed has taken these from the checkpoint, and those of the configuration may be others now.
        settings = self._settings
        for group, decay in zip(self._optimizer.param_groups, (settings.weight_decay, 0.0), strict=True):
            group.update(weight_decay=decay, betas=settings.betas, eps=settings.epsilon)
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = settings.gradient_clipping

    def close(self) -> None:
        self._engine.destroy()

    def _unsharded_norm(self) -> float:
        """Gradients are summed over data x context ranks already; a divided weight's parts lie on the tensor ranks."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        for parameter in self._engine.module.parameters():
            if parameter.grad is not None:
                divided = getattr(parameter, "tensor_model_parallel", False)
                squares[int(divided)] += parameter.grad.double().square().sum()
        whole, divided_sum = squares
        dist.all_reduce(divided_sum, group=self._mesh.tensor)
        return math.sqrt(float(whole + divided_sum))


def _parameter_groups(model: nn.Module, settings: OptimizerSection) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""

    def having(dims: Iterable[int]) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad and p.dim() in dims]

    return [
        {"params": having((2,)), "weight_decay": settings.weight_decay},
        {"params": having((0, 1)), "weight_decay": 0.0},
    ]
