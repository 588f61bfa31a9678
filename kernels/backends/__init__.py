"""The backends by name, fastest to try last."""

from farspan.kernels.backends import flash_attn_4, reference
from farspan.kernels.backends.base import Backend
from farspan.kernels.backends.torch_library import TorchLibrary
from farspan.kernels.triton import launch

REGISTRY: dict[str, Backend] = {
    "reference": reference,
    "triton": launch,
    "cudnn": TorchLibrary("cudnn", (9, 0), 128),
    "flash": TorchLibrary("flash", (8, 0), 256),
    "flash_attn_4": flash_attn_4,
}
BACKENDS = ("auto", *REGISTRY)
