"""A heat map of who computes how much and when."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from farspan.parallel.plan import DIRECTIONS
from farspan.parallel.report import Report
from farspan.trainer.config import ConfigError


def require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'farspan[plot]'")


def plot_work(reports: Sequence[Report], path: Path) -> None:
    """Visible pairs x heads by rank and stage, both directions over the same scale, as a picture of the path's kind.

    A line of maps for each report.
    """
    from matplotlib.figure import Figure

    whole = Figure(figsize=(12, 6 * len(reports)), layout="constrained")
    for figure, found in zip(whole.subfigures(len(reports), squeeze=False).flat, reports, strict=True):
        most = max(int(work.max(initial=1)) for work in found.work.values())
        for axes, direction in zip(figure.subplots(1, 2), DIRECTIONS):
            image = axes.imshow(
                found.work[direction], aspect="auto", interpolation="nearest", vmin=0, vmax=most, cmap="viridis"
            )
            axes.set(title=direction, xlabel="stage", ylabel="rank")
        figure.colorbar(image, ax=figure.axes, label="visible pairs x heads")
        figure.suptitle(
            f"{found.plan.name}, {found.plan.world} ranks: the busiest has {found.imbalance:.3f} of the mean"
        )
    try:
        whole.savefig(path)
    except ValueError as error:  # a kind of picture that matplotlib does not know
        raise ConfigError(f"--plot {path}: {error}") from error
