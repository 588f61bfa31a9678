"""The backends by name."""

from farspan.kernels.backends import flash_attn_4, reference
from farspan.kernels.backends.base import Backend
from farspan.kernels.backends.torch_library import TorchLibrary
from farspan.kernels.triton import backend as triton

REGISTRY: dict[str, Backend] = {
    "reference": reference,
    "triton": triton,
    "cudnn": TorchLibrary("cudnn", (9, 0), 128),
    "flash": TorchLibrary("flash", (8, 0), 256),
    "flash_attn_4": flash_attn_4,
}
BACKENDS = ("auto", *REGISTRY)
