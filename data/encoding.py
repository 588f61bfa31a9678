"""Documents to tokens, in one process or many, in the order in which they are read."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farspan.data.chat_template import ChatTemplate
from farspan.data.conversation import Conversation, encode_conversation
from farspan.data.errors import DataError
from farspan.data.heldout import HeldOut
from farspan.data.indexed import token_dtype
from farspan.data.pieces import Piece, Position, read_source
from farspan.data.sources import Listing, Source
from farspan.data.texts import UnusableError, content_of, refuse
from farspan.data.tokenizers import AnyTokenizer, open_tokenizer

_AT_ONCE = 1 << 19  # bytes that a process gets at once


@dataclass(frozen=True)
class Portion:
    """What a process gets at once, of source number `source`: whole documents, or one piece of a long one."""

    source: int
    pieces: tuple[Piece, ...]

    @property
    def first(self) -> bool:
        return self.pieces[0].first

    @property
    def last(self) -> bool:
        return self.pieces[-1].last

    @property
    def after(self) -> Position:
        return self.pieces[-1].after

    @property
    def read(self) -> int:
        return self.pieces[-1].read


@dataclass(frozen=True)
class Encoded:
    """The documents of a portion that can be used, one after the other.

    tokens: [tokens], each document with its end-of-document token, in the dtype of the vocabulary.
    lengths: int64 [documents], tokens in each; sizes: int64 [documents], bytes of text (0 where they came as tokens).
    notes, note_lengths: int32 [entries] and int64 [documents], what conversations say of their answers (`Answers`).
    heldout: bool [documents].
    dropped: how many were left out, by reason.
    """

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]
    notes: NDArray[np.int32]
    note_lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    heldout: NDArray[np.bool_]
    dropped: Counter[str]


@dataclass(frozen=True)
class Encoder:
    """Turns portions into tokens; `sources` are those of the configuration, `digest` is that of the tokenizer."""

    tokenizer: Path
    digest: str
    end_of_document: str | None
    sources: tuple[Source, ...]
    heldout: HeldOut
    drop_invalid: bool

    def __call__(self, portion: Portion) -> Encoded:
        tokenizer = _open_tokenizer(self.tokenizer, self.digest, self.end_of_document)
        source = self.sources[portion.source]
        parts, notes, sizes, heldout = [], [], [], []
        dropped: Counter[str] = Counter()
        for piece in portion.pieces:
            try:
                content, size = content_of(piece, source)
            except UnusableError as reason:
                refuse(source, piece, reason, self.drop_invalid)
                dropped[str(reason)] += 1
                continue
            tokens: NDArray[np.integer]
            note = np.empty(0, np.int32)
            if isinstance(content, str):
                tokens, ended = tokenizer.encode(content), False
            elif isinstance(content, Conversation):
                assert source.chat_template is not None
                try:
                    tokens, answers = encode_conversation(content, _open_template(source.chat_template), tokenizer)
                except DataError as error:
                    raise DataError(f"{piece.name} of {source.label}: {error}") from error
                note, ended = answers.notes(), True
            else:
                _check_range(content, tokenizer, source, piece.name)
                tokens, ended, size = content, content[-1] == tokenizer.eod, 0
            if piece.last and not ended:
                tokens = np.append(tokens, np.int32(tokenizer.eod))
            parts.append(tokens)
            notes.append(note)
            sizes.append(size)
            heldout.append(self.heldout(portion.source, piece.name))
        dtype = token_dtype(tokenizer.vocabulary_size)
        return Encoded(
            tokens=np.concatenate([np.empty(0, np.int32), *parts]).astype(dtype),
            lengths=np.array([len(part) for part in parts], np.int64),
            notes=np.concatenate([np.empty(0, np.int32), *notes]),
            note_lengths=np.array([len(note) for note in notes], np.int64),
            sizes=np.array(sizes, np.int64),
            heldout=np.array(heldout, np.bool_),
            dropped=dropped,
        )


def portions(listings: Sequence[Listing], source: int, start: Position, longest: int) -> Iterator[Portion]:
    """All documents from `start` of source number `source` on; a portion is of one source."""
    for number in range(source, len(listings)):
        held: list[Piece] = []
        size = 0
        for piece in read_source(listings[number], start, longest):
            if piece.first and piece.last:
                held.append(piece)
                size += _size(piece)
            elif held:  # a long document begins
                yield Portion(number, tuple(held))
                held, size = [], 0
            if not (piece.first and piece.last):
                yield Portion(number, (piece,))
            elif size >= _AT_ONCE:
                yield Portion(number, tuple(held))
                held, size = [], 0
        if held:
            yield Portion(number, tuple(held))
        start = Position()


def encode_portions(portions: Iterator[Portion], encoder: Encoder, processes: int) -> Iterator[tuple[Portion, Encoded]]:
    """Each portion with its tokens, in their order; only a few portions are in memory at a time.

    Raises DataError for a document that cannot be used, and when a process dies.
    """
    if processes == 1:
        for portion in portions:
            yield portion, encoder(portion)
        return
    # New interpreters rather than forks: a fork of a process with threads (torch has some) can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker) as pool:
        waiting: deque[tuple[Portion, Future[Encoded]]] = deque()
        try:
            for portion in portions:
                waiting.append((portion, pool.submit(encoder, portion)))
                if len(waiting) > 2 * processes:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(portion: Portion, future: Future[Encoded]) -> tuple[Portion, Encoded]:
    try:
        return portion, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes text was killed, perhaps for want of memory: lower data.processes, and run "
            "`farspan prepare` again, which goes on where it stopped."
        ) from error


def _size(piece: Piece) -> int:
    content = piece.content
    return content.nbytes if isinstance(content, np.ndarray) else len(content or "") + 64


def _check_range(tokens: NDArray[np.integer], tokenizer: AnyTokenizer, source: Source, name: str) -> None:
    if tokens.min() < 0 or tokens.max() >= tokenizer.vocabulary_size:
        raise DataError(
            f"{name} of {source.label} in data.sources has token ids from {tokens.min()} to {tokens.max()}, but those "
            f"of data.tokenizer go from 0 to {tokenizer.vocabulary_size - 1}: give the tokenizer that it was made with."
        )


@functools.lru_cache(maxsize=1)
def _open_tokenizer(path: Path, digest: str, end_of_document: str | None) -> AnyTokenizer:
    """Kept from call to call. The digest tells apart what lies at a path one after the other."""
    return open_tokenizer(path, end_of_document)


@functools.lru_cache
def _open_template(name: str) -> ChatTemplate:
    return ChatTemplate(name)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker ends when its parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
