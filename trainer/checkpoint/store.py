"""Where checkpoints live, and the only way in and out: saved whole or not at all, checked before they are used.

    checkpoints/step_00000050/              committed: has a manifest and this very name
    checkpoints/step_00000100.tmp/          being written; never loaded
    checkpoints/step_00000100.replaced/     the old one while a new one of the same step takes its place
    checkpoints/step_00000005.deleting/     half gone; never loaded
    checkpoints/step_00000075.damaged/      set aside for a person to look at; never loaded, never deleted

Every rank must see the same folder, so on several machines it lies on a file system that they share.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from farspan.trainer.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    find_damage,
    fsync_path,
    fsync_tree,
    hash_file,
    read_manifest,
    write_manifest,
)

Result = TypeVar("Result")
Problems = list[str]  # named here because the class below has a method called list
COMMITTED = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"step_\d{8,}\.(tmp|deleting|replaced)")


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was checked. `state` is what was given to `save`."""

    step: int
    path: Path
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Listed:
    """A checkpoint seen from outside, unhashed. `bytes` are those on disk; `state` is None if the manifest is bad;
    `complete` says that the manifest is good and every file is there in its size."""

    step: int
    path: Path
    bytes: int
    state: Mapping[str, Any] | None
    complete: bool


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class CheckpointStore:
    """The checkpoints of one run, the newest `keep` of them.

    `save` and `newest_valid` are collective: every rank of `group` calls them with the same arguments, and either all
    ranks return or all raise. They exchange small Python objects, so give them a gloo group made for this, also on
    CUDA machines (`torch.distributed.new_group(backend="gloo")`), with a timeout that covers the writing and hashing
    of a whole checkpoint by the slowest rank. None means that this process is alone, whatever groups exist.
    `list` and `verify` are for one process.

    Args:
        directory: holds the `step_%08d` folders; made by the first `save`.
        keep: how many committed checkpoints stay, at least 1.
        report: gets one sentence, on rank 0, for everything that a person should look at.
    """

    def __init__(self, directory: Path, keep: int, report: Callable[[str], None] = print_to_stderr) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}; it must be at least 1, or there is nothing to resume.")
        self.directory = directory
        self.keep = keep
        self.report = report

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`, whether it exists or not."""
        return self.directory / f"step_{step:08d}"

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        group: dist.ProcessGroup | None = None,
    ) -> Path:
        """Collective. Save a checkpoint of `step`, delete the oldest beyond `keep`, and return the new one's folder.

        Every rank's `write(folder)` puts that rank's files there, under names of its own; it may use collectives
        inside. `state` (rank 0's counts) is a JSON object and comes back from `newest_valid` unchanged. Until the one
        rename at the end nothing is visible, so that a failure or a kill at any moment leaves the previous
        checkpoints as they were; the `.tmp` folder that it leaves is removed by the next `newest_valid`.

        A checkpoint of the same step is replaced: it may come from before a change of configuration, and after `save`
        the folder must hold what `write` wrote. The old one is kept until the new one is in place.

        Raises:
            CheckpointError: a complete checkpoint of a later step exists, which a resume would prefer to this one; or
                another rank failed.
            Exception: what this rank's `write` raised.
        """
        ranks = Ranks(group)
        final = self.path(step)
        temporary = final.with_name(f"{final.name}.tmp")
        ranks.on_first(f"preparing {temporary}", partial(self._prepare, step, temporary))
        ranks.together(f"writing {temporary}", partial(self._write, temporary, write))
        # All ranks list: a network file system may show one of them late what another has written.
        seen = ranks.together(f"listing {temporary}", partial(_sizes, temporary))
        mine = ranks.share({name: size for sizes in seen for name, size in sizes.items()})
        hashed = ranks.together(f"hashing {temporary}", partial(_settle, temporary, mine))
        files = {name: record for records in hashed for name, record in records.items()}
        ranks.on_first(f"committing {final}", partial(self._commit, step, temporary, files, state))
        ranks.on_first(f"deleting old checkpoints in {self.directory}", partial(self._delete_old, final))
        return final

    def newest_valid(self, group: dist.ProcessGroup | None = None) -> Found | None:
        """Collective. The newest checkpoint whose manifest and files are exactly what was written; None if none is.

        Every byte is read and hashed here, shared out over the ranks, and all ranks agree before anyone returns. A
        damaged checkpoint is renamed to `step_%08d.damaged` and reported. What an interrupted `save` left is removed.

        Raises:
            CheckpointError: a rank does not see the folder, or the newest checkpoint is of an unknown format.
        """
        ranks = Ranks(group)
        ranks.on_first(f"tidying {self.directory}", self._tidy)
        steps = ranks.on_first(f"listing {self.directory}", lambda: sorted(self._steps(), reverse=True))
        for step in steps:
            path = self.path(step)
            problems = _problems(path, ranks)
            if not problems:
                manifest = ranks.on_first(f"reading {path}", partial(read_manifest, path))
                return Found(step, path, manifest.state)
            ranks.on_first(f"setting {path} aside", partial(self._set_aside, path, problems))
        if steps and ranks.rank == 0:
            self.report(f"No valid checkpoint is left in {self.directory}: all {len(steps)} were damaged.")
        return None

    def list(self) -> list[Listed]:
        """The committed checkpoints, oldest first. Nothing is hashed or changed."""
        return [_look_at(step, self.path(step)) for step in sorted(self._steps())]

    def verify(self, path: Path) -> Problems:
        """Hash the checkpoint at `path`: one line for each problem, none if it is good. Nothing is changed.

        Raises:
            CheckpointError: there is no such folder, or its format is unknown.
        """
        return _problems(path, Ranks(None))

    def _steps(self) -> Iterator[int]:
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            match = COMMITTED.fullmatch(path.name)
            if match and path == self.path(int(match[1])):
                yield int(match[1])

    def _prepare(self, step: int, temporary: Path) -> None:
        later = [listed.step for listed in self.list() if listed.complete and listed.step > step]
        if later:
            raise CheckpointError(
                f"Step {step} cannot be saved in {self.directory}: step {later[-1]} is there already, and the next "
                "resume would take it. Resume from it, move it away, or choose another run.dir."
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync_path(self.directory.parent)
        _clear(temporary)
        temporary.mkdir()

    def _write(self, temporary: Path, write: Callable[[Path], None]) -> None:
        _require_visible(temporary)
        write(temporary)

    def _commit(self, step: int, temporary: Path, files: Mapping[str, FileRecord], state: Mapping[str, Any]) -> None:
        fsync_tree(temporary)
        write_manifest(temporary, step=step, files=files, state=state)
        final = self.path(step)
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            _clear(replaced)
            os.rename(final, replaced)
        os.rename(temporary, final)
        fsync_path(self.directory)

    def _delete_old(self, final: Path) -> None:
        try:
            _clear(final.with_name(f"{final.name}.replaced"))
            complete = [listed.path for listed in self.list() if listed.complete]
            for path in complete[: -self.keep]:
                _delete(path)
        except OSError as error:
            # The new checkpoint is safe; a file that cannot be deleted must not end the training.
            self.report(f"An old checkpoint in {self.directory} could not be deleted: {error}. The disk may fill up.")

    def _tidy(self) -> None:
        for path in list(self.directory.iterdir()) if self.directory.is_dir() else []:
            if not LEFTOVER.fullmatch(path.name):
                continue
            if path.suffix == ".replaced" and not path.with_suffix("").exists():
                os.rename(path, path.with_suffix(""))  # killed before the new one took its place
            else:
                _clear(path)

    def _set_aside(self, path: Path, problems: Problems) -> None:
        suffixes = (".damaged" if number == 1 else f".damaged.{number}" for number in count(1))
        aside = next(place for suffix in suffixes if not (place := path.with_name(path.name + suffix)).exists())
        os.rename(path, aside)
        fsync_path(self.directory)
        self.report(
            f"DAMAGED CHECKPOINT {path.name}: {'; '.join(problems)}. "
            f"It was set aside as {aside} and the one before it is tried."
        )


class Ranks:
    """The ranks of a group acting as one: what one of them learns or suffers, all of them learn or raise."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def together(self, doing: str, action: Callable[[], Result]) -> list[Result]:
        """Run `action` on every rank and return all results in rank order; if it raises on one rank, all raise."""
        result: Result | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # raised again below, once no other rank can be left waiting for this one
            failure = error
        mine = (result, f"{type(failure).__name__}: {failure}" if failure else None)
        outcomes: list[Any] = [mine]
        if self.group is not None:
            outcomes = [None] * self.size
            dist.all_gather_object(outcomes, mine, group=self.group)
        if failure is not None:
            raise failure
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
        if failures:
            raise CheckpointError(f"{doing} failed on {len(failures)} of {self.size} ranks: {'; '.join(failures)}")
        return [outcome for outcome, _ in outcomes]

    def on_first(self, doing: str, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 only; every rank gets its result, or raises if it raised."""

        def act() -> Result | None:
            return action() if self.rank == 0 else None

        return self.together(doing, act)[0]  # type: ignore[return-value]  # rank 0's is a Result

    def share(self, sizes: Mapping[str, int]) -> list[str]:
        """This rank's part of the files in `sizes` (bytes): every file is one rank's, large ones are dealt first."""
        return sorted(sizes, key=lambda name: (-sizes[name], name))[self.rank :: self.size]


def _require_visible(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {path} here; on several machines run.dir must lie on a shared disk.")


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _settle(directory: Path, names: list[str]) -> dict[str, FileRecord]:
    records = {}
    for name in names:
        fsync_path(directory / name)
        records[name] = hash_file(directory / name)
    return records


def _problems(path: Path, ranks: Ranks) -> Problems:
    """Collective. Everything that is wrong with the checkpoint at `path`, the same on every rank."""

    def examine() -> Problems:
        _require_visible(path)
        try:
            manifest = _read_manifest_of(path)
        except DamagedCheckpointError as damage:
            return [str(damage)]
        mine = ranks.share({name: record.bytes for name, record in manifest.files.items()})
        damages = ((name, find_damage(path / name, manifest.files[name])) for name in mine)
        return [f"{name} {damage}" for name, damage in damages if damage]

    found = ranks.together(f"checking {path}", examine)
    return sorted({problem for problems in found for problem in problems})


def _read_manifest_of(path: Path) -> Manifest:
    manifest = read_manifest(path)
    match = COMMITTED.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        raise DamagedCheckpointError(f"the folder is {path.name}, its manifest is of step {manifest.step}")
    return manifest


def _look_at(step: int, path: Path) -> Listed:
    sizes = _sizes(path)
    try:
        manifest = _read_manifest_of(path)
    except CheckpointError:
        return Listed(step, path, sum(sizes.values()), state=None, complete=False)
    complete = all(sizes.get(name) == record.bytes for name, record in manifest.files.items())
    return Listed(step, path, sum(sizes.values()), manifest.state, complete)


def _delete(path: Path) -> None:
    """Delete a committed checkpoint, first giving it a name under which nothing loads it half deleted."""
    doomed = path.with_name(f"{path.name}.deleting")
    _clear(doomed)
    os.rename(path, doomed)
    _clear(doomed)


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
