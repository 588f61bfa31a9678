"""Documents to tokens, in one process or many, with a progress line."""

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.text import Document, read_document
from farspan.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A document as it was when it was listed: its size in bytes and the sha256 of its content."""

    document: Document
    size: int
    digest: str


def describe(document: Document) -> Source:
    """Reads a document once for its size and digest. Raises DataError when it is no text."""
    content = read_document(document.path).encode()
    return Source(document, len(content), hashlib.sha256(content).hexdigest())


def encode_documents(
    sources: Sequence[Source], tokenizer: Path, processes: int, report: Callable[[str], None]
) -> Iterator[NDArray[np.int32]]:
    """The tokens of each document, int32 [tokens] with the end-of-document token, in the order of `sources`.

    Raises DataError when a document is no longer what it was when it was listed.
    """
    encode = functools.partial(_encode, tokenizer)
    progress = _Progress(sum(source.size for source in sources), report)
    if processes == 1:
        for source in sources:
            yield encode(source)
            progress.add(source.size)
        return
    # New interpreters rather than forks: a fork of a process with threads (torch has some) can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker) as pool:
        for source, tokens in zip(sources, pool.map(encode, sources, chunksize=8), strict=True):
            yield tokens
            progress.add(source.size)


def _encode(tokenizer_path: Path, source: Source) -> NDArray[np.int32]:
    text = read_document(source.document.path)
    if hashlib.sha256(text.encode()).hexdigest() != source.digest:
        raise DataError(f"{source.document.path} of data.sources changed while it was prepared: prepare again.")
    tokenizer = _open_tokenizer(tokenizer_path)
    return np.append(tokenizer.encode(text), np.int32(tokenizer.eod))


@functools.lru_cache(maxsize=1)
def _open_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker ends when its parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Progress:
    """One line a second: how much is done, how fast, and how long it will take."""

    def __init__(self, total: int, report: Callable[[str], None]) -> None:
        self._total = total
        self._report = report
        self._done = 0
        self._started = self._last_line = time.monotonic()

    def add(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._last_line < 1.0 or self._done == 0:
            return
        self._last_line = now
        rate = self._done / (now - self._started)
        left = round((self._total - self._done) / rate)
        self._report(
            f"tokenizing {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB ({self._done / self._total:.0%}), "
            f"{rate / 1e6:.1f} MB/s, {left // 60}:{left % 60:02d} left"
        )
