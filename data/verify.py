"""Whether prepared data is what was written, and can be trained on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from farspan.data.errors import DataError
from farspan.data.indexed import TokenFile
from farspan.data.prepared import SPLITS, Prepared, find_damage, load_prepared

_AT_ONCE = 1 << 22  # tokens


def find_problems(directory: Path) -> Iterator[str]:
    """A sentence for everything that is wrong: checksums, ids outside the vocabulary, documents without an end, sources
    that do not cover the documents. Raises DataError when there is no prepared data."""
    damaged = find_damage(directory)
    yield from (f"{name} is not as written (sha256)" for name in damaged)
    try:
        prepared = load_prepared(directory)
        for split in SPLITS:
            yield from _problems_of(prepared, split)
    except DataError as error:
        yield str(error)


def _problems_of(prepared: Prepared, split: str) -> Iterator[str]:
    file = TokenFile(prepared.directory / split)
    if (len(file.lengths), file.lengths.sum()) != (prepared.documents[split], prepared.tokens[split]):
        yield f"{split}.idx has other documents than dataset.json says"
    highest = max((int(tokens.max()) for tokens in file.chunks(_AT_ONCE)), default=0)
    lowest = min((int(tokens.min()) for tokens in file.chunks(_AT_ONCE)), default=0)
    if lowest < 0 or highest >= prepared.vocabulary_size:
        last = prepared.vocabulary_size - 1
        yield f"{split}.bin has token ids from {lowest} to {highest}, and the vocabulary those from 0 to {last}"
    open_ended = np.count_nonzero(file.last_tokens() != prepared.eod)
    if open_ended:
        yield f"{open_ended:,} documents of {split} do not end with the end-of-document token"
    covered = [number for ranges in prepared.sources.values() for number in (ranges[split].start, ranges[split].stop)]
    bounds = [0, *covered, prepared.documents[split]]
    if any(before != after for before, after in zip(bounds[::2], bounds[1::2])):
        yield f"the sources do not cover the documents of {split} one after the other"
