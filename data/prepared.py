"""What a prepared directory holds, and how it is opened."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farspan.data.errors import DataError, TooLittleTextError
from farspan.data.tokenizer import EOD
from farspan.data.tokenizers import AnyTokenizer, open_tokenizer

FORMAT_VERSION = 2
DESCRIPTION = "dataset.json"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Prepared:
    """A prepared directory: documents in tokens, and the tokenizer that made them.

    documents, tokens: counts by split, "train" and "heldout".
    fingerprint: of the documents and settings that it was made from.
    sources: which documents of each split come from which source, by the source's name, in the order of the
        configuration. The ranges of a split follow each other, and together they are all of its documents.
    end_of_document: the piece that ends documents, whose id is `eod`.
    """

    directory: Path
    tokenizer_path: Path
    tokenizer_digest: str
    vocabulary_size: int
    eod: int
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    fingerprint: str
    sources: Mapping[str, Mapping[str, range]] = field(default_factory=dict)
    end_of_document: str = EOD

    def open_tokenizer(self) -> AnyTokenizer:
        """The tokenizer that the data was encoded with."""
        return open_tokenizer(self.tokenizer_path, self.end_of_document)

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
    tokenizer = description["tokenizer"]
    damaged = [name for name, file in description["files"].items() if not _has_size(directory / name, file["bytes"])]
    if not damaged and file_digest(directory / tokenizer["file"]) != tokenizer["sha256"]:
        damaged = [tokenizer["file"]]
    if damaged:
        raise DataError(
            f"{directory} is damaged ({', '.join(damaged)} not as written): remove it and run `farspan prepare CONFIG`."
        )
    splits = description["splits"]
    return Prepared(
        directory=directory,
        tokenizer_path=directory / tokenizer["file"],
        tokenizer_digest=tokenizer["sha256"],
        vocabulary_size=tokenizer["vocabulary_size"],
        eod=tokenizer["eod"],
        documents={split: splits[split]["documents"] for split in SPLITS},
        tokens={split: splits[split]["tokens"] for split in SPLITS},
        fingerprint=description["fingerprint"],
        sources={
            name: {split: range(*ranges[split]) for split in SPLITS} for name, ranges in description["sources"].items()
        },
        end_of_document=tokenizer["end_of_document"],
    )


def find_damage(directory: Path) -> list[str]:
    """The files of a prepared directory whose content is not what was written, by their sha256."""
    files = read_description(directory)["files"]
    return [
        name
        for name, file in files.items()
        if not (directory / name).is_file() or file_digest(directory / name) != file["sha256"]
    ]


def read_description(directory: Path) -> dict[str, Any]:
    """The content of `dataset.json`, which is written last: without it there is no preparation."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise TooLittleTextError(
            f"There is no prepared data in {directory} (data.directory): run `farspan prepare CONFIG`."
        )
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


def describe_file(path: Path) -> dict[str, Any]:
    """How `dataset.json` knows a file again."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
