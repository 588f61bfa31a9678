"""The kernels for Hopper (sm_90) in Gluon, Triton's lower-level dialect: explicit copies, barriers and warp roles."""
