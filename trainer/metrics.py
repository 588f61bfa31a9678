"""What a run measured: `metrics.jsonl`, the truth in full precision, and TensorBoard, a view of it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter

Value = int | float | str
_PIXELS = 16
Row = dict[str, Value]

TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "tokens": "progress/tokens",
    "step_seconds": "speed/step_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "sequence_length": "data/sequence_length",
    "context": "data/context",
}


# Names of several values, such as those by layer, and where they go.
TENSORBOARD_FOLDERS = {
    "sparse_": "sparse/",
    "eval_sparse_": "eval_sparse/",
    "blend_rows_": "data/rows_of_",
    "blend_tokens_": "data/tokens_of_",
    "blend_epochs_": "data/epochs_of_",
    "loss_length_": "loss_by_length/",
    "loss_position_": "loss_by_position/",
    "tokens_length_": "tokens_by_length/",
    "tokens_position_": "tokens_by_position/",
    "eval_loss_length_": "eval_by_length/",
    "eval_loss_position_": "eval_by_position/",
    "eval_tokens_length_": "eval_tokens_by_length/",
    "eval_tokens_position_": "eval_tokens_by_position/",
}


class MetricsError(Exception):
    """A row that cannot be written, or a file that cannot be read as rows."""


class MetricsFile:
    """One JSON object a line, one line a step. Written by one process at a time; use `close` when done.

    Floats keep all their digits. Every line is handed to the system before `append` returns, so a killed process
    leaves whole lines, and at most one half line at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, row: Mapping[str, Value]) -> None:
        """Add `row`, which has an integer `step`.

        Raises:
            MetricsError: a value is not a finite number or text (NaN is no JSON), `step` is missing, or the file ends
                in a half-written line, which `cut_after` removes.
        """
        line = _line(row)
        if self._file is None:
            self._file = self._open()
        self._file.write(line)
        self._file.flush()

    def read(self) -> list[Row]:
        """All rows; none if there is no file. A half-written last line is not one.

        Raises:
            MetricsError: any other line is not a JSON object with an integer `step`.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty or half written
        return [self._row(number, line) for number, line in enumerate(lines, start=1)]

    def cut_after(self, step: int) -> None:
        """Drop the rows of all steps after `step`, and a half-written last line, by replacing the file in one go."""
        self.close()
        if not self.path.exists():
            return
        kept = [row for row in self.read() if int(row["step"]) <= step]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            raise MetricsError(f"{self.path} ends in a half-written line; call cut_after with the step to resume from.")
        return self.path.open("a", encoding="utf-8")

    def _row(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MetricsError(f"Line {number} of {self.path} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise MetricsError(f"Line {number} of {self.path} is not an object with an integer step.")
        return row


class TensorBoard:
    """The same scalars for TensorBoard, grouped by what they speak of (`train/`, `optimizer/`, `speed/`, ...).

    TensorBoard stores 32-bit floats. Use `close` when done.

    Args:
        directory: where the event files go; a resumed run adds a file to those of the runs before it.
        purge_step: on a resume, the checkpoint's step + 1: TensorBoard drops what earlier runs wrote from there on.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=purge_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the values of one step by their names in `metrics.jsonl`.

        Raises:
            MetricsError: a name has no tag in `TENSORBOARD_TAGS`.
        """
        tags = {name: _tag(name) for name in scalars}
        unknown = sorted(name for name, tag in tags.items() if tag is None)
        if unknown:
            raise MetricsError(
                f"There is no TensorBoard tag for {', '.join(unknown)}; there is one for {', '.join(TENSORBOARD_TAGS)}."
            )
        for name, value in scalars.items():
            self._writer.add_scalar(tags[name], value, step)
        self._writer.flush()

    def heat_map(self, step: int, tag: str, values: np.ndarray, most: float) -> None:
        """A matrix as an image, with its scale beside it: each element a square, white for 0, dark for `most`, grey for
        NaN."""
        shades = np.kron(values / max(most, 1e-12), np.ones((_PIXELS, _PIXELS)))
        scale = np.linspace(1, 0, len(shades))[:, None].repeat(_PIXELS, 1)
        image = _colours(np.concatenate((shades, np.zeros((len(shades), _PIXELS)), scale), 1))
        width = shades.shape[1]
        image[::_PIXELS, :width] = image[:, : width + 1 : _PIXELS] = 1.0  # lines between the squares
        self._writer.add_image(tag, image, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tag(name: str) -> str | None:
    for start, folder in TENSORBOARD_FOLDERS.items():
        if name.startswith(start):
            return folder + name.removeprefix(start)
    return TENSORBOARD_TAGS.get(name)


def _line(row: Mapping[str, Value]) -> str:
    if not isinstance(row.get("step"), int):
        raise MetricsError(f"A row of metrics needs an integer step; given was {dict(row)!r}.")
    for name, value in row.items():
        if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise MetricsError(f"{name} of step {row['step']} is {value!r}; metrics are finite numbers or text.")
    return json.dumps(dict(row), allow_nan=False) + "\n"


def _colours(shades: np.ndarray) -> np.ndarray:
    """`[height, width, 3]` of numbers from 0 to 1: white, orange, purple, nearly black."""
    at, anchors = (0, 0.33, 0.67, 1), np.array([(1, 1, 1), (0.98, 0.62, 0.28), (0.55, 0.16, 0.51), (0.05, 0.03, 0.15)])
    return np.stack([np.nan_to_num(np.interp(shades, at, channel), nan=0.8) for channel in anchors.T], -1)
