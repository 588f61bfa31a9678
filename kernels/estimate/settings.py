"""What a user sets of the estimation of sparse indexes."""

from __future__ import annotations

from dataclasses import dataclass

_PROBES = (16, 32, 64, 128)


@dataclass(frozen=True)
class VerticalSlash:
    """How a `VerticalSlashIndex` is chosen from what some rows, the probes, attend to.

    `mass`: share of the probes' attention that is computed. `probes`: rows that are looked at, the last of the whole
    row; of each of `segments` equal parts of it; and of its longest `documents`, so many, as well. `sinks`: first
    tokens of the row that are always columns. `local_blocks`: diagonals of blocks, from 0 on, that are always computed.
    `most_columns` and `most_diagonals` bound the work of what is chosen besides these; a diagonal costs as much as 128
    columns.

    The defaults of `sinks` and `local_blocks` are those of MTraining's fixed budgets: 30 tokens, a window of 100.
    """

    mass: float = 0.9
    probes: int = 64
    segments: int = 1
    documents: int = 0
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
