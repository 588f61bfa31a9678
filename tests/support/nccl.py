"""Joining two processes of a test over NCCL."""

from __future__ import annotations

import faulthandler
import os

import torch
import torch.distributed as dist


def join(rank: int, folder: str) -> None:
    """This process takes GPU `rank` of two."""
    faulthandler.dump_traceback_later(60, repeat=True)  # where it hangs, if it does
    torch.set_num_threads(1)  # the oracle's small sums
    torch.cuda.set_device(rank)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dist.all_reduce(torch.zeros(1, device="cuda"))
