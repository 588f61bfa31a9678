"""How torch allocates memory in a process that trains."""

from __future__ import annotations

import os

# Segments that grow leave no holes that the next, longer row does not fit. Host memory is pinned by several threads,
# for `memory.offload` needs much of it: 5.6 GB/s in place of 2.0 (an H200's host).
SETTINGS = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def configure_allocator() -> None:
    """Before torch is imported; what the user has set stays."""
    if not any(name in os.environ for name in _NAMES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = SETTINGS
