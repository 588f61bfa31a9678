"""What a prepared directory holds, and how it is opened."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.data.errors import DataError

FORMAT_VERSION = 1
DESCRIPTION = "dataset.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "heldout")
FILES = (*(f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".idx")), TOKENIZER)


@dataclass(frozen=True)
class Prepared:
    """A prepared directory: documents in tokens, and the tokenizer that made them.

    documents, tokens: counts by split, "train" and "heldout".
    fingerprint: of the documents and settings that it was made from.
    """

    directory: Path
    tokenizer_path: Path
    tokenizer_digest: str
    vocabulary_size: int
    eod: int
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    fingerprint: str

    def check_tokenizer(self, path: Path) -> None:
        """Raises DataError unless the file at `path` is the tokenizer that the data was encoded with."""
        if not path.is_file():
            raise DataError(
                f"data.tokenizer is {path}, where no file is: the data in {self.directory} was encoded with "
                f"{self.tokenizer_path}."
            )
        digest = file_digest(path)
        if digest != self.tokenizer_digest:
            raise DataError(
                f"data.tokenizer is {path} (sha256 {digest[:12]}), but the data in {self.directory} was encoded with "
                f"another tokenizer (sha256 {self.tokenizer_digest[:12]}, {self.tokenizer_path}): give that one, or "
                "prepare the data again into another directory."
            )


def load_prepared(directory: Path) -> Prepared:
    """Opens what `farspan prepare` wrote. Raises DataError when it is missing, incomplete or of another version."""
    description = read_description(directory)
    damaged = [name for name, file in description["files"].items() if not _has_size(directory / name, file["bytes"])]
    if not damaged and file_digest(directory / TOKENIZER) != description["tokenizer"]["sha256"]:
        damaged = [TOKENIZER]
    if damaged:
        raise DataError(
            f"{directory} is damaged ({', '.join(damaged)} not as written): remove it and run `farspan prepare CONFIG`."
        )
    splits = description["splits"]
    return Prepared(
        directory=directory,
        tokenizer_path=directory / TOKENIZER,
        tokenizer_digest=description["tokenizer"]["sha256"],
        vocabulary_size=description["tokenizer"]["vocabulary_size"],
        eod=description["tokenizer"]["eod"],
        documents={split: splits[split]["documents"] for split in SPLITS},
        tokens={split: splits[split]["tokens"] for split in SPLITS},
        fingerprint=description["fingerprint"],
    )


def read_description(directory: Path) -> dict[str, Any]:
    """The content of `dataset.json`, which is written last: without it there is no preparation."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise DataError(f"There is no prepared data in {directory} (data.directory): run `farspan prepare CONFIG`.")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}). Remove the directory and run `farspan prepare CONFIG`."
        ) from error
    if description.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {description.get('format_version')}; this Farspan reads {FORMAT_VERSION}. "
            "Remove the directory and run `farspan prepare CONFIG`."
        )
    return description


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
