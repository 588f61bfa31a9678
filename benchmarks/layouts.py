"""Does the loss depend on the layout? Trains one configuration on several layouts and compares every step.

    python benchmarks/layouts.py configs/quickstart.yaml --steps 20 \
        "launch.processes=1 parallel.context=1" "launch.processes=2 parallel.context=2"

Each argument is one layout: overrides of the configuration. The first is the one that others are compared with. The
text must be prepared (`farspan prepare`). Prints a table and appends one JSON object a layout to --json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("layouts", nargs="+", metavar="'key=value ...'")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    first: list[dict[str, Any]] = []
    print(f"{options.config}, {options.steps} steps, torch {torch.__version__}, {device}")
    print(f"{'layout':<84} {'last loss':>9} {'eval loss':>9} {'worst loss':>11} {'worst norm':>11} {'s/step':>7}")
    for layout in options.layouts:
        rows = train(options.config, layout.split(), options.steps)
        first = first or rows
        result = {
            "layout": layout,
            "device": device,
            "steps": options.steps,
            "last_loss": rows[-1]["loss"],
            "eval_loss": rows[-1]["eval_loss"],
            "worst_loss_difference": worst(first, rows, "loss"),
            "worst_norm_difference": worst(first, rows, "grad_norm"),
            "step_seconds": statistics.median(row["step_seconds"] for row in rows[1:]),
        }
        print(
            f"{layout:<84} {result['last_loss']:9.5f} {result['eval_loss']:9.5f} "
            f"{result['worst_loss_difference']:11.2e} {result['worst_norm_difference']:11.2e} "
            f"{result['step_seconds']:7.3f}",
            flush=True,
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")


def train(config: Path, overrides: list[str], steps: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a fresh run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "farspan.launch.command", "train", str(config), *overrides]
        command += [f"run.dir={folder}/run", f"train.steps={steps}", f"checkpoint.every={steps}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(overrides)} failed with exit code {done.returncode}:\n{done.stderr[-4000:]}")
        return [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]


def worst(first: list[dict[str, Any]], rows: list[dict[str, Any]], key: str) -> float:
    """Largest relative difference over all steps."""
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(first, rows, strict=True))


if __name__ == "__main__":
    main()
