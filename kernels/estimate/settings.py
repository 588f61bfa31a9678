"""What a user sets of the choice of sparse indexes, one class a method."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.kernels.tiles import TILE

_PROBES = (16, 32, 64, 128)
_STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class VerticalSlash:
    """How a `VerticalSlashIndex` is chosen from what some rows, the probes, attend to.

    `mass`: share of the probes' attention that is computed. `probes`: rows that are looked at, the last of the whole
    row; of each of `segments` equal parts of it; and of its longest `documents`, so many, as well, for the last rows of
    a row that ends with a short document see nothing far away. `sinks`: first tokens of the row that are always
    columns. `local_blocks`: diagonals of blocks, from 0 on, that are always computed. `most_columns` and
    `most_diagonals` bound the work of what is chosen besides these; a diagonal costs as much as 128 columns.

    The defaults of `sinks` and `local_blocks` are those of MTraining's fixed budgets: 30 tokens, a window of 100.
    """

    mass: float = 0.9
    probes: int = 64
    segments: int = 1
    documents: int = 1
    sinks: int = 30
    local_blocks: int = 2
    most_columns: int = 4096
    most_diagonals: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"attention.sparse.mass is a share above 0 and at most 1, got {self.mass}")
        if self.probes not in _PROBES:
            raise ValueError(f"attention.sparse.probes must be one of {_PROBES}, got {self.probes}")
        least = {"segments": 1, "documents": 0, "sinks": 0, "local_blocks": 1, "most_columns": 1, "most_diagonals": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"attention.sparse.{name} is at least {lowest}, got {getattr(self, name)}")


@dataclass(frozen=True)
class XAttention:
    """How XAttention chooses tiles: `stride` tokens are a side of a cell, and `threshold` a share of the cells' mass.

    The defaults are those of MTraining's comparison.
    """

    stride: int = 16
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if self.stride not in _STRIDES:
            raise ValueError(f"attention.sparse.stride must be one of {_STRIDES}, got {self.stride}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"attention.sparse.threshold is a share above 0 and at most 1, got {self.threshold}")


@dataclass(frozen=True)
class MoBA:
    """How MoBA chooses: chunks of `chunk` tokens, of which a row computes `top_k`, its own one among them.

    The defaults are those of MTraining's comparison at 512K tokens, 9.4 % of a row.
    """

    chunk: int = 4096
    top_k: int = 12

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk % TILE:
            raise ValueError(f"attention.sparse.chunk is a multiple of {TILE} tokens, got {self.chunk}")
        if self.top_k < 1:
            raise ValueError(f"attention.sparse.top_k is at least 1, got {self.top_k}")


Settings = VerticalSlash | XAttention | MoBA
