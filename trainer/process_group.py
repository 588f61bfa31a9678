"""The default process group of a worker."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def start_process_group() -> torch.device:
    """As the rank that RANK and WORLD_SIZE name, or as the only one; the device of this rank."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    # A rank waits for the slowest one, and one step over a million tokens takes minutes.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1), device_id=device if cuda else None)
    return device
