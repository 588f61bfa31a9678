"""Work and bytes by rank and stage, in lines of text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from farspan.parallel.plan import DIRECTIONS
from farspan.parallel.report import Report

_MOST_RANKS = 64


def by_rank(found: Report, itemsize: int, width: int) -> Iterator[str]:
    """A table of all ranks; of more than 64 the quantiles, and the rank with the most work."""
    work = found.work["forward"]
    share = work.sum(1) * len(work) / max(1, work.sum())
    sent = {direction: found.bytes_by_stage(direction, itemsize, 4) for direction in DIRECTIONS}
    megabytes = [sent[direction].sum(1) / 1e6 for direction in DIRECTIONS]
    if len(work) > _MOST_RANKS:
        yield from _quantiles(share, megabytes)
        worst = int(share.argmax())
        stage = int(work[worst].argmax())
        at_stage = work[worst, stage] * len(work) / max(1, work[:, stage].sum())
        busiest = f"{at_stage:.3f} at stage {stage}, its busiest"
        yield f"rank {worst} has the most work: {share[worst]:.3f} of the mean, {busiest}"
        return
    yield f"{'ranks':<8}{'work':>8}{'MB sent forward':>20}{'backward':>16}   a layer; work is of the mean"
    rows = [f"{part:>8.3f}{ahead:>20,.3f}{back:>16,.3f}" for part, ahead, back in zip(share, *megabytes)]
    for ranks, row in _merged(rows):
        yield f"{ranks:<8}{row}"
    for title, table in (
        ("work forward", work),
        ("bytes sent forward", sent["forward"]),
        ("bytes sent backward", sent["backward"]),
    ):
        if table.any() and table.shape[1] + 8 <= width:
            yield f"{title} by stage, one column each: 9 is the most, . is none"
            for ranks, row in _merged(["".join(_digits(line, table.max())) for line in table]):
                yield f"{ranks:<8}{row}"


def _quantiles(share: np.ndarray, megabytes: list[np.ndarray]) -> Iterator[str]:
    yield f"{'over ranks':<28}{'least':>12}{'25 %':>12}{'median':>12}{'75 %':>12}{'most':>12}"
    titles = ["work, of the mean", "MB sent forward, a layer", "MB sent backward, a layer"]
    for title, values in zip(titles, [share, *megabytes]):
        yield f"{title:<28}" + "".join(f"{value:>12,.3f}" for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))


def _digits(values: np.ndarray, most: int) -> list[str]:
    """0 to 9 for a share of the most, and a point for none."""
    return ["." if value == 0 else str(int(9 * value / most)) for value in values.tolist()]


def _merged(rows: list[str]) -> Iterator[tuple[str, str]]:
    """Ranks one after another with the same row as one: such as ("0-7", row)."""
    first = 0
    for rank in range(1, len(rows) + 1):
        if rank == len(rows) or rows[rank] != rows[first]:
            yield str(first) if rank == first + 1 else f"{first}-{rank - 1}", rows[first]
            first = rank
