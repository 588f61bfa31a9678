"""Estimators: which tiles and columns of the attention matrix to compute, from queries and keys."""

from farspan.kernels.estimate.probes import Probes, probe_positions
from farspan.kernels.estimate.settings import MoBA, Settings, VerticalSlash, XAttention
from farspan.kernels.estimate.vertical_slash import Alone, Budgets, Holders, vertical_slash

__all__ = [
    "Alone",
    "Budgets",
    "Holders",
    "MoBA",
    "Probes",
    "Settings",
    "VerticalSlash",
    "XAttention",
    "probe_positions",
    "vertical_slash",
]
