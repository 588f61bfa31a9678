"""The backends by name."""

from farspan.kernels.backends import reference
from farspan.kernels.backends.base import Backend
from farspan.kernels.backends.flash_attn_4 import FlashAttention4
from farspan.kernels.backends.torch_library import TorchLibrary
from farspan.kernels.triton import backend as triton

REGISTRY: dict[str, Backend] = {
    "reference": reference,
    "triton": triton,
    "cudnn": TorchLibrary("cudnn", (9, 0), 128),
    "flash": TorchLibrary("flash", (8, 0), 256),
    "flash_attn_4": FlashAttention4(deterministic=False),
    "flash_attn_4_deterministic": FlashAttention4(deterministic=True),
}
# The fastest of all, and the fastest of those whose results repeat bit for bit.
CHOICES = ("auto", "deterministic")
BACKENDS = (*CHOICES, *REGISTRY)
