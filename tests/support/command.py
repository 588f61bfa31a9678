"""The farspan command, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def farspan(*words: str, code: int = 0) -> str:
    """What it said, on both streams; it has to end with `code`."""
    command = [sys.executable, "-m", "farspan.launch.command", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def last_metrics(run: Path) -> dict[str, Any]:
    """Of the newest step of the run in this folder."""
    row: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return row
