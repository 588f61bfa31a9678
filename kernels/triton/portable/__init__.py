"""The kernels in Triton's own language: any device that it compiles for, any head dim, fp32 too."""
