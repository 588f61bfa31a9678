"""A heat map of who computes how much and when."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from farspan.parallel.plan import DIRECTIONS
from farspan.parallel.report import Report
from farspan.trainer.config import ConfigError


def check_plot(path: Path) -> None:
    """ConfigError unless a picture of the path's kind can be drawn there: plans of many ranks take minutes."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'farspan[plot]'")
    from matplotlib.figure import Figure

    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}")
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"--plot {path}: the name must end in one of {', '.join(kinds)}")


def plot_work(reports: Mapping[str, Report], path: Path) -> None:
    """Visible pairs x heads by rank and stage, both directions over the same scale, as a picture of the path's kind.

    A line of maps for each report, by what its layers see. ConfigError when the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    whole = Figure(figsize=(12, 6 * len(reports)), layout="constrained")
    figures = whole.subfigures(len(reports), squeeze=False).flat
    for figure, (seen, found) in zip(figures, reports.items(), strict=True):
        most = max(int(work.max(initial=1)) for work in found.work.values())
        for axes, direction in zip(figure.subplots(1, 2), DIRECTIONS):
            image = axes.imshow(
                found.work[direction], aspect="auto", interpolation="nearest", vmin=0, vmax=most, cmap="viridis"
            )
            axes.set(title=direction, xlabel="stage", ylabel="rank")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=figure.axes, label="visible pairs x heads")
        layers = f"layers whose tokens see {seen}: " if len(reports) > 1 else ""
        figure.suptitle(
            f"{layers}{found.plan.name}, {found.plan.world} ranks, the busiest has {found.imbalance:.3f} of the mean"
        )
    try:
        whole.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}") from error
