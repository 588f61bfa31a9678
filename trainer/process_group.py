"""The default process group of a worker."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def start_process_group(timeout_seconds: float) -> torch.device:
    """As the rank that RANK and WORLD_SIZE name, or as the only one; the device of this rank.

    A rank that waits for another one longer than `timeout_seconds` gives up.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    alone = os.environ["WORLD_SIZE"] == "1"
    os.environ.setdefault("MASTER_PORT", "0" if alone else "29500")  # 0: any that is free; nobody else has to know it
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    return device
