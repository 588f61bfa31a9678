"""Prepared tokens as text again, with the bounds of documents."""

from collections.abc import Iterator

import numpy as np

from farspan.data.corpus import Corpus, Split
from farspan.data.errors import DataError
from farspan.data.prepared import Prepared


def show(prepared: Prepared, split: Split, start: int, tokens: int) -> Iterator[str]:
    """The text of `tokens` tokens of a split from number `start` on, in the order of its file: for each document a line
    that says whose tokens follow, then these. Raises DataError when the split has no token of that number."""
    corpus, tokenizer = Corpus(prepared, split), prepared.open_tokenizer()
    ends = np.cumsum(corpus.lengths)
    total = int(ends[-1]) if len(ends) else 0
    if not 0 <= start < total:
        raise DataError(f"the {split} split of {prepared.directory} has tokens 0 to {total - 1:,}, not {start:,}")
    stop = min(start + tokens, total)
    document = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        length, end = int(corpus.lengths[document]), int(ends[document])
        first, last = start - (end - length), min(stop, end) - (end - length)
        source = _source(prepared, split, document)
        yield f"=== document {document:,} of {split}, from {source}: tokens {first:,} to {last:,} of {length:,} ==="
        yield tokenizer.decode(corpus.read(document, first, last))
        start, document = min(stop, end), document + 1


def document_start(prepared: Prepared, split: Split, document: int) -> tuple[int, int]:
    """Where a document begins in its split, and how many tokens it has. Raises DataError when there is none."""
    lengths = Corpus(prepared, split).lengths
    if not 0 <= document < len(lengths):
        raise DataError(
            f"the {split} split of {prepared.directory} has documents 0 to {len(lengths) - 1:,}, not {document:,}"
        )
    return int(lengths[:document].sum()), int(lengths[document])


def _source(prepared: Prepared, split: Split, document: int) -> str:
    return next((name for name, ranges in prepared.sources.items() if document in ranges[split]), "no source")
