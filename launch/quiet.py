"""Silences what libraries say at import time and at every start, and that no user of ours can act on."""

from __future__ import annotations

import os
import warnings

import torch


def quiet_libraries() -> None:
    """Call it before Megatron Core and DeepSpeed are imported."""
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="When using async grad allreduce it is recommended")
    # DeepSpeed warns when it has to find out by itself that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
