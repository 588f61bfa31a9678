"""Attention kernels in Triton, for every interval mask: any device that Triton compiles for."""
