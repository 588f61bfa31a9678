"""Text to a directory of tokens: `farspan prepare`."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from farspan.data.encoding import Source, describe, encode_documents
from farspan.data.errors import DataError
from farspan.data.prepared import (
    DESCRIPTION,
    FILES,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER,
    Prepared,
    file_digest,
    load_prepared,
    read_description,
)
from farspan.data.text import named_documents, read_document
from farspan.data.tokenizer import Tokenizer, train_tokenizer

__all__ = ["Prepared", "load_prepared", "prepare"]

# What a preparation depends on, in words of the configuration.
_KEYS = {
    "documents": "documents in data.sources",
    "seed": "run.seed",
    "heldout_fraction": "data.heldout_fraction",
    "tokenizer": "data.vocabulary_size or data.tokenizer",
}


def prepare(
    sources: Sequence[str],
    directory: Path,
    *,
    tokenizer: Path | None,
    vocabulary_size: int,
    heldout_fraction: float,
    seed: int,
    processes: int = 1,
    report: Callable[[str], None] = print,
) -> Prepared:
    """Encodes all documents of `sources` into `directory`, as Megatron `.bin` and `.idx` files by split.

    Each document ends with the end-of-document token. Whether a document is held out depends on `seed` and its path
    within its source only, unless that keeps none: then it is the one whose size is nearest to that share of the text.
    Without `tokenizer`, one of `vocabulary_size` pieces is trained on the documents that are not held out; with one,
    `vocabulary_size` is not read. `processes` encode; `report` gets lines for the user, those of progress at most once
    a second.

    Everything is written beside `directory` and renamed when complete, so that `directory` is whole or absent whoever
    is interrupted, and of several processes that prepare the same at once, one wins and all return. A directory that
    holds the same preparation already is checked and returned.

    Raises DataError when there is no text, or one document alone, a split is empty, a file changes meanwhile, the
    tokenizer does not do, or `directory` holds something else.
    """
    documents = [describe(document) for document in named_documents(sources)]
    splits = _split(documents, heldout_fraction, seed)
    inputs = {
        "documents": _digest([(source.document.name, source.size, source.digest) for source in documents]),
        "seed": seed,
        "heldout_fraction": heldout_fraction,
        "tokenizer": Tokenizer(tokenizer).digest if tokenizer else f"trained, {vocabulary_size} pieces",
    }
    present = _present(directory, inputs)
    if present:
        report(f"{directory} already holds these {len(documents):,} documents, prepared. Nothing to do.")
        return present
    megabytes = sum(source.size for source in documents) / 1e6
    report(f"{len(documents):,} documents, {megabytes:,.1f} MB; {len(splits['heldout']):,} of them are held out")

    directory.parent.mkdir(parents=True, exist_ok=True)
    # More than the process id: containers that share a disk have the same ones.
    staging = directory.with_name(f"{directory.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        if tokenizer:
            shutil.copyfile(tokenizer, staging / TOKENIZER)
        else:
            report(f"training a tokenizer of {vocabulary_size:,} pieces")
            texts = (read_document(source.document.path) for source in splits["train"])
            # One thread: SentencePiece writes their number into the file, and they hardly make it faster.
            train_tokenizer(texts, staging / TOKENIZER, vocabulary_size, threads=1, seed=seed)
        counts = {split: _write(splits[split], split, staging, processes, report) for split in SPLITS}
        _describe(staging, inputs, counts)
        prepared = _publish(staging, directory, inputs)
    finally:
        if staging.exists():
            shutil.rmtree(staging)
    report(
        f"{directory} is ready: {prepared.tokens['train']:,} tokens to train on in "
        f"{prepared.documents['train']:,} documents, {prepared.tokens['heldout']:,} held out in "
        f"{prepared.documents['heldout']:,}"
    )
    return prepared


def _split(documents: Sequence[Source], heldout_fraction: float, seed: int) -> dict[str, list[Source]]:
    if not 0 < heldout_fraction < 1:
        raise DataError(f"data.heldout_fraction is {heldout_fraction}: give a number between 0 and 1, such as 0.05.")
    if len(documents) == 1:
        raise DataError(
            f"data.sources has one document, {documents[0].document.name}, and documents are held out as a whole: "
            "divide it into several files, or add documents to data.sources."
        )
    splits: dict[str, list[Source]] = {split: [] for split in SPLITS}
    for source in documents:
        place = int(_digest([seed, source.document.name])[:16], 16) / 2**64
        splits["heldout" if place < heldout_fraction else "train"].append(source)
    if not splits["heldout"]:
        share = heldout_fraction * sum(source.size for source in documents)
        nearest = min(documents, key=lambda source: (abs(source.size - share), source.document.name))
        splits["train"].remove(nearest)
        splits["heldout"].append(nearest)
    if not splits["train"]:
        raise DataError(
            f"With data.heldout_fraction {heldout_fraction} all {len(documents)} documents are held out: lower "
            "data.heldout_fraction, or add documents to data.sources."
        )
    return splits


def _present(directory: Path, inputs: Mapping[str, object]) -> Prepared | None:
    """What `directory` holds: the same preparation, or nothing (None). Raises DataError for anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / DESCRIPTION).is_file():
        raise DataError(
            f"{directory} exists and is not a prepared dataset: remove it, or set data.directory to a new directory."
        )
    description = read_description(directory)
    if description["fingerprint"] != _digest(inputs):
        other = [_KEYS[name] for name, value in inputs.items() if description["inputs"].get(name) != value]
        raise DataError(
            f"{directory} holds data prepared from other inputs (other {', '.join(other)}): remove it to prepare "
            "again, or set data.directory to a new directory."
        )
    damaged = [name for name, file in description["files"].items() if not _is_intact(directory / name, file["sha256"])]
    if damaged:
        raise DataError(f"{directory} is damaged ({', '.join(damaged)} not as written): remove it, then prepare again.")
    return load_prepared(directory)


def _write(
    sources: Sequence[Source], split: str, staging: Path, processes: int, report: Callable[[str], None]
) -> dict[str, int]:
    # Imported here: it takes seconds, as it brings the whole of Megatron Core with it.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    vocabulary_size = Tokenizer(staging / TOKENIZER).vocabulary_size
    builder = IndexedDatasetBuilder(
        str(staging / f"{split}.bin"), dtype=np.uint16 if vocabulary_size <= 1 << 16 else np.int32
    )
    tokens = 0
    for document in encode_documents(sources, staging / TOKENIZER, processes, report):
        builder.add_document(document, [len(document)])
        tokens += len(document)
    builder.finalize(str(staging / f"{split}.idx"))
    return {"documents": len(sources), "tokens": tokens}


def _describe(staging: Path, inputs: Mapping[str, object], counts: Mapping[str, Mapping[str, int]]) -> None:
    for name in FILES:
        _flush(staging / name)
    tokenizer = Tokenizer(staging / TOKENIZER)
    description = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _digest(inputs),
        "inputs": inputs,
        "tokenizer": {
            "sha256": tokenizer.digest,
            "vocabulary_size": tokenizer.vocabulary_size,
            "eod": tokenizer.eod,
        },
        "splits": counts,
        "files": {
            name: {"bytes": (staging / name).stat().st_size, "sha256": file_digest(staging / name)} for name in FILES
        },
    }
    (staging / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    _flush(staging / DESCRIPTION)
    _flush(staging)


def _publish(staging: Path, directory: Path, inputs: Mapping[str, object]) -> Prepared:
    try:
        staging.rename(directory)  # takes the place of an empty directory, never of one with content
    except OSError:
        present = _present(directory, inputs)  # another process was faster
        if present is None:
            raise
        return present
    _flush(directory.parent)
    return load_prepared(directory)


def _flush(path: Path) -> None:
    """Has the system write a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_intact(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest
