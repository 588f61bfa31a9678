"""The manifest of a checkpoint: what it holds, how large every file is and what its bytes hash to.

A folder without a readable manifest is no checkpoint. The manifest carries a digest of itself, because a flipped
byte in `"tokens": 1000` is still good JSON and would resume a run in the wrong place.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

FORMAT = 1
MANIFEST_NAME = "manifest.json"


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or used; the message says which and why."""


class DamagedCheckpointError(CheckpointError):
    """What is on disk is not what was written."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 hexadecimal digits) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`files` maps paths relative to the checkpoint's folder to their records; `state` is the trainer's JSON object."""

    step: int
    files: Mapping[str, FileRecord]
    state: Mapping[str, Any]


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of the file at `path`, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(bytes=file.tell(), sha256=digest)


def find_damage(path: Path, record: FileRecord) -> str | None:
    """What is wrong with the file at `path`, worded to follow its name; None if it is what `record` says.

    Raises:
        OSError: the file cannot be read for a reason that says nothing of its content, such as missing rights.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"has {size:,} bytes instead of {record.bytes:,}"
    try:
        found = hash_file(path)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return "cannot be read from the disk (input/output error)"
    return None if found == record else f"has SHA-256 {found.sha256[:12]}... instead of {record.sha256[:12]}..."


def fsync_path(path: Path) -> None:
    """Wait until the file's bytes, or the folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """`fsync_path` for every file and folder below `directory`, and then for `directory`."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def write_manifest(directory: Path, *, step: int, files: Mapping[str, FileRecord], state: Mapping[str, Any]) -> None:
    """Write `directory/manifest.json` so that it is there whole or not at all, also after a power failure.

    Raises:
        CheckpointError: `state` would not come back from JSON as it was given, or a file has the manifest's name.
    """
    if MANIFEST_NAME in files:
        raise CheckpointError(f"A checkpoint's own file may not be called {MANIFEST_NAME}; choose another name.")
    records = {name: asdict(files[name]) for name in sorted(files)}
    body = {"format": FORMAT, "step": step, "state": dict(state), "files": records}
    try:
        document = body | {"digest": _digest(body)}
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The state of step {step} is not JSON: {error}.") from error
    if json.loads(text) != document:
        raise CheckpointError(
            f"The state of step {step} would not come back from JSON as it was given; "
            "use only dict with str keys, list, str, int, float, bool and None."
        )
    temporary = directory / f"{MANIFEST_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST_NAME)
    fsync_path(directory)


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`, checked against its own digest.

    Raises:
        DamagedCheckpointError: it is missing, cut short or altered.
        CheckpointError: it is whole, but of a format that this version of Farspan does not know.
    """
    document = _read_json(directory / MANIFEST_NAME)
    if not isinstance(document, dict) or "digest" not in document:
        raise DamagedCheckpointError(f"{MANIFEST_NAME} holds no manifest")
    body = {key: value for key, value in document.items() if key != "digest"}
    if document["digest"] != _digest(body):
        raise DamagedCheckpointError(f"{MANIFEST_NAME} was altered: its digest does not fit its content")
    # Only after the digest: a strange version number in an intact manifest is another Farspan's, not damage.
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / MANIFEST_NAME} has format {body.get('format')!r}, this version of Farspan reads format "
            f"{FORMAT}; use the version that wrote it, or another run.dir."
        )
    match body:
        case {"step": int(step), "state": dict(state), "files": dict(files), **rest} if set(rest) == {"format"}:
            return Manifest(step, {name: _record(name, value) for name, value in files.items()}, state)
    raise DamagedCheckpointError(f"{MANIFEST_NAME} must hold format, step, state, files and digest, and nothing else")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path.name} is missing") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise DamagedCheckpointError(f"{path.name} is not JSON: {error}") from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedCheckpointError(f"{path.name} cannot be read from the disk (input/output error)") from error


def _record(name: str, value: Any) -> FileRecord:
    # A name that leads out of the folder would let a manifest vouch for files that no one saved here.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == ".":
        raise DamagedCheckpointError(f"{MANIFEST_NAME} names a file outside of its folder: {name!r}")
    match value:
        case {"bytes": int(size), "sha256": str(digest)} if len(value) == 2 and size >= 0 and len(digest) == 64:
            return FileRecord(size, digest)
    raise DamagedCheckpointError(f"{MANIFEST_NAME} has a malformed record for {name}: {value!r}")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
