"""Rows keep every digit, survive a kill, and can be cut back to a checkpoint; TensorBoard shows the same."""

import io
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from farspan.trainer.metrics import TENSORBOARD_TAGS, MetricsError, MetricsFile, TensorBoard


def rows(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": math.pi / (step + 1), "tokens": 2**40 + step} for step in steps]


def filled(path: Path, *steps: int) -> MetricsFile:
    metrics = MetricsFile(path)
    for row in rows(*steps):
        metrics.append(row)
    return metrics


def die(target: Callable[[], None]) -> None:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def test_rows_come_back_to_the_last_digit_and_in_order(tmp_path: Path) -> None:
    metrics = filled(tmp_path / "metrics.jsonl", 1, 2, 3)
    assert metrics.read() == rows(1, 2, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows(1, 2, 3)


def test_no_file_has_no_rows_and_nothing_to_cut(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.cut_after(5)
    assert metrics.read() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, [1.0], {"a": 1}])
def test_what_is_no_finite_number_is_refused_and_nothing_written(tmp_path: Path, value: Any) -> None:
    metrics = filled(tmp_path / "metrics.jsonl", 1)
    with pytest.raises(MetricsError, match=r"grad_norm of step 2 is .*finite numbers"):
        metrics.append({"step": 2, "loss": 1.0, "grad_norm": value})
    assert metrics.read() == rows(1)


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1.0}, {"step": "1"}])
def test_a_row_needs_an_integer_step(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(MetricsError, match="integer step"):
        MetricsFile(tmp_path / "metrics.jsonl").append(row)


@pytest.mark.parametrize(("cut", "left"), [(0, ()), (1, (1,)), (2, (1, 2)), (9, (1, 2, 3))])
def test_cut_after_a_step_and_go_on(tmp_path: Path, cut: int, left: tuple[int, ...]) -> None:
    metrics = filled(tmp_path / "metrics.jsonl", 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics.cut_after(cut)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[: len(left)])  # not a digit changes
    metrics.append(rows(10)[0])
    assert metrics.read() == rows(*left, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_row_is_in_the_file_when_the_process_is_killed(tmp_path: Path) -> None:
    def append_and_die() -> None:
        filled(tmp_path / "metrics.jsonl", 1, 2, 3)
        os.kill(os.getpid(), signal.SIGKILL)

    die(append_and_die)
    assert MetricsFile(tmp_path / "metrics.jsonl").read() == rows(1, 2, 3)


def test_a_half_written_last_line_is_no_row_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 1, 2, 3).close()
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for length in range(second + 1, len(whole)):
        path.write_bytes(whole[:length])
        metrics = MetricsFile(path)
        assert metrics.read() == rows(1, 2)
        with pytest.raises(MetricsError, match="half-written line; call cut_after"):
            metrics.append(rows(3)[0])
        metrics.cut_after(3)
        assert path.read_bytes() == whole[:second]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', ""])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(MetricsError, match="Line 2 of"):
        MetricsFile(path).read()
    with pytest.raises(MetricsError, match="Line 2 of"):
        MetricsFile(path).cut_after(1)
    assert path.read_text().count("\n") == 3


def scalars(directory: Path, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(directory)).Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_tensorboard_shows_every_metric_under_its_group(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, purge_step=None)
    board.write(6, {"loss": 6.0})
    board.write(7, {name: float(number) for number, name in enumerate(TENSORBOARD_TAGS)})
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]  # readable while the run goes on
    board.close()
    assert tags == [
        "train/loss",
        "eval/loss",
        "optimizer/grad_norm",
        "optimizer/learning_rate",
        "progress/tokens",
        "speed/step_seconds",
        "speed/tokens_per_second",
        "data/sequence_length",
        "data/context",
    ]
    assert [scalars(tmp_path, tag)[7] for tag in tags] == [float(number) for number in range(9)]


def test_every_scalar_is_in_the_event_file_when_the_process_is_killed(tmp_path: Path) -> None:
    def write_and_die() -> None:
        board = TensorBoard(tmp_path, purge_step=None)
        for step in range(1, 51):
            board.write(step, {name: float(step) for name in TENSORBOARD_TAGS})
        os.kill(os.getpid(), signal.SIGKILL)

    die(write_and_die)
    for tag in TENSORBOARD_TAGS.values():
        assert scalars(tmp_path, tag) == {step: float(step) for step in range(1, 51)}


def test_a_resumed_run_purges_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, purge_step=None)
    for step in range(1, 9):
        first.write(step, {"loss": float(step), "learning_rate": 0.5})
    first.close()
    assert scalars(tmp_path, "train/loss") == {step: float(step) for step in range(1, 9)}

    time.sleep(1.1)  # event files are ordered by the second they were made in
    second = TensorBoard(tmp_path, purge_step=5 + 1)
    second.write(6, {"loss": 60.0})
    second.close()
    assert scalars(tmp_path, "train/loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 60.0}
    assert sorted(scalars(tmp_path, "optimizer/learning_rate")) == [1, 2, 3, 4, 5]


def test_a_heat_map_has_a_square_for_each_element_and_one_scale_for_all(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, purge_step=None)
    board.heat_map(1, "map", np.array([[0.0, 0.5, 1.0], [0.25, 0.25, 0.25]]), 1.0)
    board.heat_map(2, "map", np.array([[0.0, 0.5, 0.5], [0.25, 0.25, 0.25]]), 1.0)
    board.close()
    events = EventAccumulator(str(tmp_path), {"images": 0})
    events.Reload()
    first, second = (np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images("map"))
    assert first.shape == (32, 3 * 16 + 2 * 16, 3)
    assert (first[8, 8] == 255).all()
    assert first[8, 40].max() < 50
    assert (first[8, 24] == second[8, 24]).all()  # not in proportion to the largest value of a step
    assert (first[8, 24] == second[8, 40]).all()


def test_a_name_without_a_tag_is_refused(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, purge_step=None)
    with pytest.raises(MetricsError, match="no TensorBoard tag for gnorm; there is one for loss, eval_loss"):
        board.write(1, {"loss": 1.0, "gnorm": 1.0})
    board.close()
