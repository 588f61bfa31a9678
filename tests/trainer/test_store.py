"""A checkpoint is loaded whole or not at all, whatever happened to it or to the process that wrote it."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from farspan.trainer.checkpoint import store as store_module
from farspan.trainer.checkpoint.manifest import CheckpointError, FileRecord, find_damage
from farspan.trainer.checkpoint.store import CheckpointStore


def state_of(step: int) -> dict[str, Any]:
    return {"tokens": 1000 * step, "mesh": {"context": 2}}


def write_files(content: str, folder: Path) -> None:
    (folder / "rank_0").mkdir()
    (folder / "rank_0" / "optimizer.pt").write_text(f"optimizer {content} " * 100)
    (folder / "model.pt").write_text(f"model {content}")
    (folder / "empty").touch()


def write_model(text: str, folder: Path) -> None:
    (folder / "model.pt").write_text(text)


def new_store(directory: Path, keep: int = 3) -> tuple[CheckpointStore, list[str]]:
    reports: list[str] = []
    return CheckpointStore(directory, keep, reports.append), reports


def filled(directory: Path, *steps: int, keep: int = 3) -> tuple[CheckpointStore, list[str]]:
    store, reports = new_store(directory, keep)
    for step in steps:
        assert store.save(step, partial(write_files, str(step)), state_of(step)) == store.path(step)
    return store, reports


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def newest_step(store: CheckpointStore) -> int | None:
    """The step that is found, once it was checked that folder, state and files belong together."""
    found = store.newest_valid()
    if found is None:
        return None
    assert found.path == store.path(found.step)
    assert found.state == state_of(found.step)
    assert (found.path / "model.pt").read_text().startswith(f"model {found.step}")
    assert store.verify(found.path) == []
    return found.step


# Saving, listing and keeping


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    store, reports = filled(tmp_path / "run" / "checkpoints", 50, 100)
    assert names(store.directory) == ["step_00000050", "step_00000100"]
    assert names(store.path(100)) == ["empty", "manifest.json", "model.pt", "rank_0"]
    assert newest_step(store) == 100
    assert reports == []


def test_an_absent_folder_holds_nothing(tmp_path: Path) -> None:
    store, reports = new_store(tmp_path / "checkpoints")
    assert store.newest_valid() is None
    assert store.list() == []
    assert reports == []
    assert not store.directory.exists()


def test_the_newest_by_step_stay(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5, 10, 100, keep=2)
    assert names(tmp_path) == ["step_00000010", "step_00000100"]
    assert newest_step(store) == 100


def test_a_step_of_nine_digits_is_newer_than_one_of_eight(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 99_999_999, 100_000_000, 100_000_001, keep=2)
    assert names(tmp_path) == ["step_100000000", "step_100000001"]
    assert [listed.step for listed in store.list()] == [100_000_000, 100_000_001]
    assert newest_step(store) == 100_000_001


def test_keep_must_leave_something(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep is 0; it must be at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_a_broken_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5, 10)
    (store.path(10) / "model.pt").unlink()
    store.keep = 2
    store.save(15, partial(write_files, "15"), state_of(15))
    assert [listed.step for listed in store.list() if listed.complete] == [5, 15]


def test_list_says_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5, 10, 15)
    (store.path(10) / "empty").write_text("no longer")
    (store.path(15) / "manifest.json").unlink()
    for other in ("step_00000020.tmp", "step_00000001.deleting", "step_7", "step_000000030", "notes"):
        (tmp_path / other).mkdir()
    before = names(tmp_path)
    good, resized, without = store.list()
    assert (good.step, good.path, good.state, good.complete) == (5, store.path(5), state_of(5), True)
    assert good.bytes == sum(path.stat().st_size for path in store.path(5).rglob("*") if path.is_file())
    assert (resized.step, resized.state, resized.complete) == (10, state_of(10), False)
    assert (without.step, without.state, without.complete) == (15, None, False)
    assert names(tmp_path) == before


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5, 10)
    store.save(10, partial(write_model, "model 10, second"), state_of(10))
    assert names(tmp_path) == ["step_00000005", "step_00000010"]
    assert names(store.path(10)) == ["manifest.json", "model.pt"]
    assert newest_step(store) == 10


def test_a_step_before_one_that_is_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5, 10)
    with pytest.raises(CheckpointError, match=r"Step 7 cannot be saved .* step 10 is there already.*run\.dir"):
        store.save(7, lambda folder: pytest.fail("written"), {})
    assert names(tmp_path) == ["step_00000005", "step_00000010"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5)

    def run_out_of_disk(folder: Path) -> None:
        write_files("10", folder)
        with open("/dev/full", "w") as device:
            device.write("x")

    with pytest.raises(OSError, match="No space left on device"):
        store.save(10, run_out_of_disk, state_of(10))
    assert [listed.step for listed in store.list()] == [5]
    store.save(10, partial(write_model, "model 10"), state_of(10))
    assert names(store.path(10)) == ["manifest.json", "model.pt"]  # nothing of the failed attempt
    assert newest_step(store) == 10


def test_a_state_that_is_no_json_commits_nothing(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 5)
    with pytest.raises(CheckpointError, match="state of step 10"):
        store.save(10, partial(write_files, "10"), {"loss": float("nan")})
    assert newest_step(store) == 5


def test_an_old_checkpoint_that_cannot_be_deleted_is_reported_and_the_new_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reports = filled(tmp_path, 5, keep=1)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        store.save(10, partial(write_files, "10"), state_of(10))
    assert len(reports) == 1
    assert "could not be deleted" in reports[0]
    assert "Permission denied" in reports[0]
    assert newest_step(store) == 10
    assert names(tmp_path) == ["step_00000010"]  # and the next start has removed the rest


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["model.pt", "rank_0/optimizer.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    store, reports = filled(tmp_path, 5, 10)
    if name == "manifest.json" and harm is truncate:
        truncate(store.path(10) / name)  # the last byte is only a newline
    harm(store.path(10) / name)
    assert len(store.verify(store.path(10))) == 1
    assert newest_step(store) == 5
    assert names(tmp_path) == ["step_00000005", "step_00000010.damaged"]
    assert len(reports) == 1
    assert reports[0].startswith(f"DAMAGED CHECKPOINT step_00000010: {name} ")
    assert "step_00000010.damaged" in reports[0]


def test_an_empty_file_that_grew_is_damage(tmp_path: Path) -> None:
    store, reports = filled(tmp_path, 5, 10)
    (store.path(10) / "empty").write_text("x")
    assert newest_step(store) == 5
    assert "empty has 1 bytes instead of 0" in reports[0]


def test_verify_names_every_problem_and_changes_nothing(tmp_path: Path) -> None:
    store, reports = filled(tmp_path, 5)
    flip(store.path(5) / "model.pt")
    truncate(store.path(5) / "rank_0" / "optimizer.pt")
    (store.path(5) / "empty").unlink()
    problems = store.verify(store.path(5))
    assert [problem.split()[0] for problem in problems] == ["empty", "model.pt", "rank_0/optimizer.pt"]
    assert names(tmp_path) == ["step_00000005"]
    assert reports == []
    with pytest.raises(CheckpointError, match="There is no folder"):
        store.verify(store.path(6))


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path: Path) -> None:
    store, reports = filled(tmp_path, 5)
    shutil.copytree(store.path(5), store.path(10))
    assert newest_step(store) == 5
    assert "the folder is step_00000010, its manifest is of step 5" in reports[0]


def test_all_damaged_is_said_and_earlier_damage_is_not_overwritten(tmp_path: Path) -> None:
    for _ in range(3):
        store, reports = filled(tmp_path, 5)
        flip(store.path(5) / "model.pt")
        assert store.newest_valid() is None
        assert len(reports) == 2
        assert reports[1].startswith("No valid checkpoint is left in ")
    assert names(tmp_path) == ["step_00000005.damaged", "step_00000005.damaged.2", "step_00000005.damaged.3"]


def test_an_unknown_format_stops_instead_of_being_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, reports = filled(tmp_path, 5)
    monkeypatch.setattr("farspan.trainer.checkpoint.manifest.FORMAT", 2)
    with pytest.raises(CheckpointError, match="reads format 2"):
        store.newest_valid()
    assert names(tmp_path) == ["step_00000005"]
    assert reports == []


def test_a_file_without_read_rights_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path, 5)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("farspan.trainer.checkpoint.manifest.hash_file", refuse)
    with pytest.raises(PermissionError):
        store.newest_valid()
    assert names(tmp_path) == ["step_00000005"]


# kill -9 during a save, at every single operation on the file system


def save_and_die(directory: Path, step: int, keep: int, die_at: int) -> None:
    """Save in this process, which kills itself just before the operation number `die_at` on the file system."""
    operations = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
            if operations == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    sys.addaudithook(count)
    store, _ = new_store(directory, keep)
    store.save(step, partial(write_files, f"{step}, again"), state_of(step))


def saves_until_done(
    tmp_path: Path, before: tuple[int, ...], step: int, keep: int
) -> list[tuple[set[str], int | None]]:
    """For each moment of death: the names that the killed process left, and the step that is found afterwards."""
    outcomes = []
    for die_at in range(1000):
        directory = tmp_path / f"die_at_{die_at}"
        filled(directory, *before, keep=keep)
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(directory, step, keep, die_at))
        process.start()
        process.join(30)
        left = set(names(directory)) if directory.exists() else set()
        store, reports = new_store(directory, keep)
        found = newest_step(store)
        assert reports == [], f"killed at operation {die_at}, something was taken for damaged"
        assert all("." not in name for name in (names(directory) if directory.exists() else ()))
        outcomes.append((left, found))
        if process.exitcode == 0:
            return outcomes
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("the save never ended")


@pytest.mark.parametrize(
    ("before", "step", "keep"),
    [((), 10, 1), ((5,), 10, 1), ((2, 5), 10, 2), ((5, 10), 10, 2), ((10,), 10, 1)],
    ids=["first", "replacing the only one", "dropping the oldest", "same step again", "same and only step again"],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, before: tuple[int, ...], step: int, keep: int
) -> None:
    outcomes = saves_until_done(tmp_path, before, step, keep)
    old = max(before, default=None)
    steps = [found for _, found in outcomes]
    change = steps.index(step)
    assert steps == [old] * change + [step] * (len(steps) - change)
    assert any("step_00000010.tmp" in left for left, _ in outcomes)  # the kills did reach the middle of a save
    if len(before) == keep and step not in before:
        assert any(f"step_{min(before):08d}.deleting" in left for left, _ in outcomes)
    if step in before:
        assert any({"step_00000010.tmp", "step_00000010.replaced"} <= left for left, _ in outcomes)
        assert any({"step_00000010", "step_00000010.replaced"} <= left for left, _ in outcomes)


MOMENTS = {  # the first operation on a path that ends so
    "before write": ("os.mkdir", "rank_0"),
    "in the middle of write": ("open", "model.pt"),
    "before manifest": ("open", "manifest.json.tmp"),
    "before rename": ("os.rename", "step_00000010.tmp"),
    "during retention": ("os.remove", "model.pt"),
}


def save_and_die_when(directory: Path, event: str, ending: str) -> None:
    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event and str(arguments[0]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    store, _ = new_store(directory, keep=1)
    store.save(10, partial(write_files, "10"), state_of(10))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_a_named_moment(tmp_path: Path, moment: str) -> None:
    store, reports = filled(tmp_path, 5, keep=1)
    process = multiprocessing.get_context("fork").Process(target=save_and_die_when, args=(tmp_path, *MOMENTS[moment]))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    left = names(tmp_path)
    if moment == "during retention":
        assert left == ["step_00000005.deleting", "step_00000010"]
        assert newest_step(store) == 10
    else:
        assert left == ["step_00000005", "step_00000010.tmp"]
        assert newest_step(store) == 5
    assert reports == []
    store.save(15, partial(write_files, "15"), state_of(15))  # and life goes on
    assert names(tmp_path) == ["step_00000015"]


# Two processes


def work(rank: int, directory: Path) -> None:
    """One of two ranks; what it saw goes to `rank_N.json`."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    store, reports = new_store(directory / "checkpoints")
    saw: dict[str, Any] = {}

    def write(step: int, folder: Path) -> None:
        (folder / f"rank_{rank}.pt").write_text(f"rank {rank} step {step}")
        (folder / f"rank_{rank}_more.pt").write_text(f"more of rank {rank} step {step}")

    def write_and_fail_on(failing: int, folder: Path) -> None:
        write(15, folder)
        if rank == failing:
            with open("/dev/full", "w") as device:
                device.write("x")

    def find() -> list[Any]:
        found = store.newest_valid(group)
        return [None, None] if found is None else [found.step, dict(found.state)]

    def attempt(action: Callable[[], Any]) -> str:
        try:
            return f"returned {action()}"
        except (OSError, CheckpointError) as error:
            return f"{type(error).__name__}: {error}"

    checked: list[str] = []

    def find_damage_and_note(path: Path, record: FileRecord) -> str | None:
        checked.append(path.name)
        return find_damage(path, record)

    vars(store_module)["find_damage"] = find_damage_and_note

    saw["nothing"] = find()
    for step in (5, 10):
        store.save(step, partial(write, step), {"step": step, "rank": rank}, group)
    saw["files"] = names(store.path(10))
    saw["found"] = find()
    saw["checked"] = checked.copy()
    for failing in (0, 1):
        saw[f"rank {failing} fails"] = attempt(partial(store.save, 15, partial(write_and_fail_on, failing), {}, group))
        saw[f"after rank {failing} failed"] = [find(), names(store.directory)]
    saw["too early"] = attempt(partial(store.save, 7, partial(write, 7), {}, group))
    if rank == 0:
        flip(store.path(10) / "rank_1.pt")
    dist.barrier(group)
    saw["after damage"] = [find(), names(store.directory), reports]
    (directory / f"rank_{rank}.json").write_text(json.dumps(saw))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("two_ranks")
    command = [sys.executable, __file__, str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
def test_two_ranks_save_and_find_the_same(two_ranks: list[dict[str, Any]]) -> None:
    for saw in two_ranks:
        assert saw["nothing"] == [None, None]
        assert saw["files"] == ["manifest.json", "rank_0.pt", "rank_0_more.pt", "rank_1.pt", "rank_1_more.pt"]
        assert saw["found"] == [10, {"step": 10, "rank": 0}]
        assert "Step 7 cannot be saved" in saw["too early"]


@pytest.mark.distributed
def test_two_ranks_share_the_hashing(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (saw["checked"] for saw in two_ranks)
    assert len(first) == len(second) == 2
    assert {*first, *second} == {"rank_0.pt", "rank_0_more.pt", "rank_1.pt", "rank_1_more.pt"}


@pytest.mark.distributed
@pytest.mark.parametrize("failing", [0, 1])
def test_one_ranks_failure_is_everyones_and_commits_nothing(two_ranks: list[dict[str, Any]], failing: int) -> None:
    there, other = two_ranks[failing], two_ranks[1 - failing]
    assert there[f"rank {failing} fails"].startswith("OSError: [Errno 28] No space left on device")
    assert f"rank {failing}: OSError: [Errno 28] No space left on device" in other[f"rank {failing} fails"]
    assert other[f"rank {failing} fails"].startswith("CheckpointError: writing ")
    for saw in two_ranks:
        assert saw[f"after rank {failing} failed"] == [
            [10, {"step": 10, "rank": 0}],
            ["step_00000005", "step_00000010"],
        ]


@pytest.mark.distributed
def test_two_ranks_agree_on_damage_that_one_of_them_finds(two_ranks: list[dict[str, Any]]) -> None:
    for saw in two_ranks:
        found, left, _ = saw["after damage"]
        assert found == [5, {"step": 5, "rank": 0}]
        assert left == ["step_00000005", "step_00000010.damaged"]
    assert [len(saw["after damage"][2]) for saw in two_ranks] == [1, 0]  # said once, by rank 0
    assert "rank_1.pt has SHA-256" in two_ranks[0]["after damage"][2][0]


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[1]))
