"""A prepared directory comes into being: unfinished beside its place, then renamed, whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from farspan.data.errors import DataError
from farspan.data.files import flush_folder
from farspan.data.prepared import DESCRIPTION, Prepared, find_damage, load_prepared, read_description
from farspan.data.unfinished import is_work, read_journal, remove_work

# What a preparation depends on, in words of the configuration.
_KEYS = {
    "documents": "documents in data.sources",
    "seed": "run.seed",
    "heldout_fraction": "data.heldout_fraction",
    "tokenizer": "data.vocabulary_size or data.tokenizer",
    "longest_record": "data.drop_invalid or data.max_record_bytes",
}
Inputs = Mapping[str, object]


def partial_folder(directory: Path) -> Path:
    """Where what will be `directory` grows."""
    return directory.with_name(f"{directory.name}.partial")


def digest(value: object) -> str:
    """The sha256 of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def present(directory: Path, inputs: Inputs) -> Prepared | None:
    """What `directory` holds: the same preparation, or nothing (None). Raises DataError for anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / DESCRIPTION).is_file():
        raise DataError(
            f"{directory} exists and is not a prepared dataset: remove it, or set data.directory to a new directory."
        )
    description = read_description(directory)
    if description["fingerprint"] != digest(inputs):
        raise DataError(
            f"{directory} holds data prepared from other inputs (other {_others(inputs, description['inputs'])}): "
            "remove it to prepare again, or set data.directory to a new directory."
        )
    damaged = find_damage(directory)
    if damaged:
        raise DataError(f"{directory} is damaged ({', '.join(damaged)} not as written): remove it, then prepare again.")
    return load_prepared(directory)


def begin(partial: Path, inputs: Inputs, report: Callable[[str], None]) -> None:
    """Keeps what an earlier preparation of the same inputs has left in `partial`, and removes that of others.

    Raises DataError when the folder is not one of ours.
    """
    if not partial.exists():
        return
    complete = _description(partial)
    journal = complete or read_journal(partial)
    if journal is None and any(partial.iterdir()) and not is_work(partial):
        raise DataError(f"{partial} is in the way of what `farspan prepare` writes: remove it, or set data.directory.")
    if journal is not None and _goes_on(journal["inputs"], inputs, complete is not None):
        report(f"going on with {partial}")
        return
    if journal is not None:
        report(f"{partial} was prepared from other inputs (other {_others(inputs, journal['inputs'])}): starting over")
    shutil.rmtree(partial)


def publish(partial: Path, directory: Path) -> Prepared:
    """Takes the place of nothing or of an empty directory, never of one with content."""
    remove_work(partial)
    partial.rename(directory)
    flush_folder(directory.parent)
    return load_prepared(directory)


def _description(partial: Path) -> dict[str, Any] | None:
    return read_description(partial) if (partial / DESCRIPTION).is_file() else None


def _goes_on(before: Inputs, inputs: Inputs, complete: bool) -> bool:
    """As long as nothing that cannot be read was met, it does not matter that it would have been refused; but what is
    complete says from which inputs."""
    return before == inputs or (not complete and before == {**inputs, "longest_record": None})


def _others(inputs: Inputs, before: Inputs) -> str:
    return ", ".join(_KEYS[name] for name, value in inputs.items() if before.get(name) != value)
