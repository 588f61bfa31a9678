"""Text to a directory of tokens: `farspan prepare`."""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from farspan.data.answers import notes_name
from farspan.data.encoding import Encoder, encode_portions, portions
from farspan.data.errors import DataError
from farspan.data.files import copy_whole, write_whole
from farspan.data.heldout import HeldOut, choose_heldout
from farspan.data.indexed import token_dtype, write_index
from farspan.data.job import Job
from farspan.data.lock import one_writer
from farspan.data.prepared import DESCRIPTION, FORMAT_VERSION, SPLITS, Prepared, describe_file, load_prepared
from farspan.data.progress import Progress
from farspan.data.publish import begin, digest, partial_folder, present, publish
from farspan.data.report import describe, write_report
from farspan.data.sources import MAX_RECORD_BYTES, Source, files_left_out, hash_files, list_sources
from farspan.data.texts import EMPTY
from farspan.data.tokenizer import train_tokenizer
from farspan.data.tokenizers import AnyTokenizer, open_tokenizer
from farspan.data.unfinished import Unfinished

__all__ = ["Prepared", "load_prepared", "prepare"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    sources: Sequence[str | Source],
    directory: Path,
    *,
    tokenizer: Path | None,
    vocabulary_size: int,
    heldout_fraction: float,
    seed: int,
    end_of_document: str | None = None,
    drop_invalid: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
    processes: int = 1,
    report: Callable[[str], None] = print,
    terminal: TextIO | None = None,
) -> Prepared:
    """Encodes all documents of `sources` into `directory`, as Megatron `.bin` and `.idx` files by split.

    Each document ends with the end-of-document token; empty ones are left out. Whether a document is held out depends
    on `seed` and its name within its source only, unless that keeps none: then it is the one whose size is nearest to
    that share of the text. Without `tokenizer`, one of `vocabulary_size` pieces is trained on the documents that are
    not held out; with one, `vocabulary_size` is not read, and `end_of_document` names its piece that ends documents.
    What cannot be read is refused, or left out and counted with `drop_invalid`; so are lines of JSON, rows of tables
    and stretches of text without a space that have more than `max_record_bytes`. `processes` encode; `report` gets
    lines for the user, and `terminal` a progress bar, where there is one.

    Memory grows by some bytes a document, and not with the text. Everything is written into `directory`.partial and
    renamed when it is complete, so that `directory` is whole or absent, whoever is interrupted; the next one goes on
    from there, to the same files. A directory that holds the same preparation already is checked and returned.

    Raises DataError when there is no text, or one document alone, all are held out, a file changes meanwhile or is
    damaged, the tokenizer does not do, the disk is full, another process prepares the directory, or it holds
    something else.
    """
    listings = list_sources(sources)
    for listing in listings:
        if left_out := files_left_out(listing):
            report(f"{listing.source.path}: left out {left_out}")
    reading = Progress("reading", sum(listing.size for listing in listings), report, terminal)
    job = Job(
        listings=hash_files(listings, reading.add),
        tokenizer=tokenizer,
        vocabulary_size=vocabulary_size,
        end_of_document=end_of_document,
        heldout_fraction=heldout_fraction,
        seed=seed,
        drop_invalid=drop_invalid,
        max_record_bytes=max_record_bytes,
        processes=processes,
        report=report,
        terminal=terminal,
    )
    reading.end()
    inputs = job.inputs()
    prepared = present(directory, inputs)
    if prepared is not None:
        report(f"{directory} already holds these documents, prepared. Nothing to do.")
        return prepared
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _full_disk(directory), one_writer(directory):
        prepared = present(directory, inputs)
        if prepared is not None:  # another process was faster
            return prepared
        partial = partial_folder(directory)
        begin(partial, inputs, report)
        if not (partial / DESCRIPTION).is_file():
            _fill(partial, job, inputs)
        prepared = publish(partial, directory)
    report(
        f"{directory} is ready: {prepared.tokens['train']:,} tokens to train on in "
        f"{prepared.documents['train']:,} documents, {prepared.tokens['heldout']:,} held out in "
        f"{prepared.documents['heldout']:,}"
    )
    return prepared


def _fill(partial: Path, job: Job, inputs: dict[str, object]) -> None:
    """Writes what is not there yet, and the description last."""
    files = sum(len(listing.files) for listing in job.listings)
    job.report(f"{files:,} files, {job.size / 1e6:,.1f} MB")
    heldout = choose_heldout(job.texts(), job.heldout_fraction, job.seed)
    unfinished = Unfinished(partial, inputs)
    try:
        unfinished.commit()
        tokenizer = _tokenizer(partial / job.tokenizer_name, job, heldout)
        _encode(unfinished, job, partial / job.tokenizer_name, tokenizer, heldout)
        _check_splits(unfinished)
        _describe(unfinished, job, inputs, tokenizer)
    finally:
        unfinished.close()


def _tokenizer(path: Path, job: Job, heldout: HeldOut) -> AnyTokenizer:
    if not path.is_file() and job.tokenizer is not None:
        write_whole(path, job.tokenizer.read_bytes())
    elif not path.is_file():
        job.report(f"training a tokenizer of {job.vocabulary_size:,} pieces")
        texts = (text.words for text in job.texts() if not heldout(text.source, text.name))
        # One thread: SentencePiece writes their number into the file, and they hardly make it faster.
        train_tokenizer(texts, path, job.vocabulary_size, threads=1, seed=job.seed)
    return open_tokenizer(path, job.end_of_document)


def _encode(unfinished: Unfinished, job: Job, path: Path, tokenizer: AnyTokenizer, heldout: HeldOut) -> None:
    sources = tuple(listing.source for listing in job.listings)
    encoder = Encoder(path, tokenizer.digest, job.end_of_document, sources, heldout, job.drop_invalid)
    before = [sum(listing.size for listing in job.listings[:number]) for number in range(len(sources))]
    waiting = portions(job.listings, unfinished.source, unfinished.position, job.max_record_bytes)
    progress: Progress | None = None
    for portion, encoded in encode_portions(waiting, encoder, job.processes):
        unfinished.add(portion, encoded)
        done = before[portion.source] + portion.read
        if progress is None:
            progress = Progress("encoding", job.size, job.report, job.terminal, done)
        progress.reach(done, len(encoded.tokens))
    if progress is not None:
        progress.end()
    unfinished.finish(len(sources))


def _check_splits(unfinished: Unfinished) -> None:
    """A document of which a later piece cannot be read was there when they were drawn."""
    dropped = sum(count for counts in unfinished.dropped for reason, count in counts.items() if reason != EMPTY)
    for split in SPLITS:
        if not len(unfinished.documents(split)):
            raise DataError(
                f"data.sources leaves no document for the {split} split, since {dropped:,} could not be read, which "
                "data.drop_invalid leaves out: mend these, add documents to data.sources, or change "
                "data.heldout_fraction."
            )


def _describe(unfinished: Unfinished, job: Job, inputs: dict[str, object], tokenizer: AnyTokenizer) -> None:
    """The indexes, the report, and last of all what the directory is known by."""
    folder = unfinished.folder
    documents = {split: unfinished.documents(split) for split in SPLITS}
    names = [job.tokenizer_name]
    for split in SPLITS:
        write_index(folder / f"{split}.idx", documents[split][:, 0], token_dtype(tokenizer.vocabulary_size))
        names += [f"{split}.bin", f"{split}.idx"]
        notes, entries = notes_name(split), documents[split][:, 2]
        if entries.any():
            copy_whole(unfinished.notes(split), folder / f"{notes}.bin")
            write_index(folder / f"{notes}.idx", entries, np.dtype("<i4"))
            names += [f"{notes}.bin", f"{notes}.idx"]
    starts = [[0 for _ in SPLITS], *unfinished.boundaries]
    ranges = {
        listing.name: {
            split: range(first, stop) for split, first, stop in zip(SPLITS, starts[number], starts[number + 1])
        }
        for number, listing in enumerate(job.listings)
    }
    for line in write_report(describe(documents, ranges, unfinished.dropped), documents, folder):
        job.report(line)
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "fingerprint": digest(inputs),
        "inputs": inputs,
        "tokenizer": {
            "file": job.tokenizer_name,
            "sha256": tokenizer.digest,
            "vocabulary_size": tokenizer.vocabulary_size,
            "end_of_document": tokenizer.end_of_document,
            "eod": tokenizer.eod,
        },
        "splits": {
            split: {"documents": len(documents[split]), "tokens": int(documents[split][:, 0].sum())} for split in SPLITS
        },
        "sources": {
            name: {split: [here.start, here.stop] for split, here in splits.items()} for name, splits in ranges.items()
        },
        "files": {name: describe_file(folder / name) for name in names},
    }
    write_whole(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


@contextmanager
def _full_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DataError(
            f"{directory} (data.directory) cannot be written ({error.strerror}): make room and run `farspan prepare` "
            "again, which goes on where it stopped."
        ) from error
