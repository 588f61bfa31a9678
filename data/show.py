"""Prepared tokens as text again, with the bounds of documents."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from farspan.data.answers import Answers
from farspan.data.corpus import Corpus, Split
from farspan.data.errors import DataError
from farspan.data.prepared import Prepared
from farspan.data.tokenizers import AnyTokenizer

_ANSWER = "⟦", "⟧"


def show(prepared: Prepared, split: Split, start: int, tokens: int) -> Iterator[str]:
    """The text of `tokens` tokens of a split from number `start` on, in the order of its file: for each document a line
    that says whose tokens follow, then these, with marks around a conversation's answers.

    Raises DataError when the split has no token of that number.
    """
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
        source, answers = _source(prepared, split, document), corpus.answers(document)
        where = f"tokens {first:,} to {last:,} of {length:,}"
        if answers is not None:
            where += f", with loss between {_ANSWER[0]} and {_ANSWER[1]}"
        yield f"=== document {document:,} of {split}, from {source}: {where} ==="
        yield _marked(corpus.read(document, first, last), answers, first, tokenizer)
        start, document = min(stop, end), document + 1


def _marked(tokens: NDArray[np.int64], answers: Answers | None, first: int, tokenizer: AnyTokenizer) -> str:
    """Text of a document's tokens from `first` on, with marks around those that are part of an answer."""
    if answers is None:
        return tokenizer.decode(tokens)
    held = answers.hold(first, first + len(tokens))
    bounds = np.flatnonzero(np.diff(held)) + 1
    parts = []
    for part, answer in zip(np.split(tokens, bounds), np.split(held, bounds), strict=True):
        text = tokenizer.decode(part)
        parts.append(_ANSWER[0] + text + _ANSWER[1] if answer.any() else text)
    return "".join(parts)


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
