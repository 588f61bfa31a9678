"""How long is a whole optimizer step, and what would a user pick instead? Farspan and its peer on the same text.

    python benchmarks/step.py --model qwen2.5-3b --lengths 32768,65536 --peer huggingface memory.recompute=selective

Overrides of the configuration (benchmarks/step.yaml) come last. Each side is a process of its own, one after the other.
Prints a table and appends one JSON object a side and length to --output; docs/benchmarks.md says what the columns are.
The text is prepared at the first call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from farspan.launch.allocator import SETTINGS

_HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--model", default="qwen2.5-3b", help="a preset of configs/models")
    parser.add_argument("--lengths", default="32768", help="tokens of a row, with commas")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one above 128K tokens")
    parser.add_argument("--peer", choices=("huggingface",), help="who else trains")
    parser.add_argument("--config", type=Path, default=_HERE / "step.yaml")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    options = parser.parse_intermixed_args()

    overrides = [f"model.preset={options.model}", *options.overrides]
    prepare_text(options.config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder) / "step.jsonl"
        rows: list[dict[str, Any]] = []
        for side in ["farspan", *([options.peer] if options.peer else [])]:
            rows += run(side, options.config, options.lengths, options.steps, overrides, output)
    print_table(rows, options.model)
    if len(rows) < len(options.lengths.split(",")) * (2 if options.peer else 1):
        sys.exit("not everything was measured; what went wrong is said above")


def prepare_text(config: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "farspan.launch.command", "prepare", str(config), *overrides]
    if subprocess.run(command).returncode:
        raise SystemExit("the text could not be prepared")


def run(side: str, config: Path, lengths: str, steps: int, overrides: list[str], output: Path) -> list[dict[str, Any]]:
    """The rows that one side appended to `output`; a length that it did not come to is missing."""
    before = len(output.read_text().splitlines()) if output.exists() else 0
    command = [sys.executable, str(_HERE / "step_child.py"), side, "--config", str(config)]
    command += ["--lengths", lengths, "--steps", str(steps), "--output", str(output), *overrides]
    subprocess.run(command, env={"PYTORCH_CUDA_ALLOC_CONF": SETTINGS} | os.environ)  # for both sides alike
    return [json.loads(line) for line in output.read_text().splitlines()[before:]] if output.exists() else []


def print_table(rows: list[dict[str, Any]], model: str) -> None:
    columns = ("seconds", "tokens/s", "MFU", "GiB", "attention", "index", "other", "loss", "optimizer", "ratio")
    print(f"\n{model}, one optimizer step; attention to optimizer in seconds")
    print(f"{'':<12}{'tokens':>9}{'weights':>15}" + "".join(f"{column:>11}" for column in columns))
    ours = {row["length"]: row for row in rows if row["trainee"] == "farspan" and row["status"] == "ok"}
    for row in sorted(rows, key=lambda row: row["length"]):
        head = f"{row['trainee']:<12}{row['length']:>9,}{row['parameters']:>15,}"
        if row["status"] != "ok":
            print(f"{head}  {row['status']}")
            continue
        cells = [f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}"]
        cells += ["" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}"]
        for part in ("attention", "index", "other", "loss", "optimizer"):
            seconds = row.get(f"{part}_seconds")
            cells.append("" if seconds is None else f"{seconds:.3f}")
        own = ours.get(row["length"])
        # How many times as many tokens per second Farspan trains on.
        cells.append(f"{row['seconds'] / own['seconds']:.3f}" if own else "")
        print(head + "".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    main()
