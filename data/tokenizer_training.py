"""A tokenizer from files: `farspan tokenizer train`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from farspan.data.heldout import choose_heldout
from farspan.data.sources import MAX_RECORD_BYTES, Source, list_sources
from farspan.data.texts import read_texts
from farspan.data.tokenizer import train_tokenizer


def train_on_sources(
    sources: Sequence[str | Source],
    path: Path,
    vocabulary_size: int,
    *,
    seed: int,
    heldout_fraction: float | None = None,
    drop_invalid: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> None:
    """Trains a SentencePiece model of `vocabulary_size` pieces and writes it to `path`: the one that `farspan prepare`
    would train, where all is alike. With `heldout_fraction`, documents that would be held out are not read.

    Raises DataError when there is no text, or too little for so many pieces.
    """
    listings = list_sources(sources)
    heldout = None
    if heldout_fraction is not None:
        heldout = choose_heldout(read_texts(listings, max_record_bytes, drop_invalid), heldout_fraction, seed)
    texts = read_texts(listings, max_record_bytes, drop_invalid)
    chosen = (text for text in texts if heldout is None or not heldout(text.source, text.name))
    strings = (text.words for text in chosen if not isinstance(text.content, np.ndarray))
    train_tokenizer(strings, path, vocabulary_size, threads=1, seed=seed)
