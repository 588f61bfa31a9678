"""Attention kernels for every interval mask, in Triton: portable ones, and ones for Hopper in its dialect Gluon."""
