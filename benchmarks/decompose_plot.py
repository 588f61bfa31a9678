"""Pictures of what `decompose.py` measured: python benchmarks/decompose_plot.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(folder: Path) -> None:
    """Draws decompose.png beside decompose.json."""
    from matplotlib.figure import Figure

    result: dict[str, Any] = json.loads((folder / "decompose.json").read_text())
    figure = Figure(figsize=(15, 5), layout="constrained")
    by_step, by_time, by_length = figure.subplots(1, 3)

    times = {int(length): seconds for length, seconds in result["step_seconds_by_length"].items()}
    found = result["fit"]
    by_step.plot(times.keys(), times.values(), "o", label="median of steps")
    line = [found["a"] + found["b"] * length for length in times]
    by_step.plot(times.keys(), line, label=f"{found['a']:.3f} + {found['b']:.2e} x length, R² {found['r2']:.3f}")
    by_step.set(title="a step of decomposed rows", xlabel="tokens of a row", ylabel="seconds", ylim=(0, None))

    for name, arm in result["arms"].items():
        seconds, losses = zip(*arm["heldout"][1:])  # the loss of no training would hide all others
        rate = f"{arm['tokens_per_second']:,.0f} tokens/s"
        by_time.plot(seconds, losses, "o-", label=f"{name}, {rate}")
        lengths = sorted(arm["loss_by_length"], key=int)
        by_length.plot([int(n) for n in lengths], [arm["loss_by_length"][n] for n in lengths], "o-", label=name)
    by_time.axvline(result["equal_time_seconds"], color="grey", linewidth=0.5)
    by_time.set(title="held-out text, documents by themselves", xlabel="seconds of training", ylabel="loss")
    by_length.set_xscale("log", base=2)
    by_length.set(title="held-out rows of one document", xlabel="tokens of a row", ylabel="loss")
    for axes in (by_step, by_time, by_length):
        axes.legend()
    figure.suptitle(f"{result['machine']}, {result['tokens']:,} tokens each")
    figure.savefig(folder / "decompose.png", dpi=120)


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
