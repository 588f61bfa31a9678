"""From what files hold to text: JSON is parsed, UTF-8 decoded, and what cannot be used gets a reason."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farspan.data.conversation import Conversation, read_conversation
from farspan.data.errors import DataError
from farspan.data.pieces import Piece, Position, TooLong, read_source
from farspan.data.sources import Listing, Source

EMPTY = "empty"
Content = str | Conversation | NDArray[np.integer]


class UnusableError(ValueError):
    """A document that cannot be encoded. The message is the reason, as in "it is ...": "not JSON"."""


class Text(NamedTuple):
    """A document, or a part of a long one, of source number `source`; tokens where the source has these.

    `size` is in bytes: of UTF-8, or of the tokens as they are stored.
    """

    source: int
    name: str
    content: Content
    size: int

    @property
    def words(self) -> str:
        """What a tokenizer is trained on."""
        return self.content.text if isinstance(self.content, Conversation) else str(self.content)


def read_texts(listings: Sequence[Listing], longest: int, drop_invalid: bool) -> Iterator[Text]:
    """All documents that can be encoded, source by source. Raises DataError for others, unless they are dropped."""
    for number, listing in enumerate(listings):
        for piece in read_source(listing, Position(), longest):
            try:
                content, size = content_of(piece, listing.source)
            except UnusableError as reason:
                refuse(listing.source, piece, reason, drop_invalid)
            else:
                yield Text(number, piece.name, content, size)


def refuse(source: Source, piece: Piece, reason: UnusableError, drop_invalid: bool) -> None:
    """Raises DataError, naming the document, unless it is to be dropped; empty ones always are."""
    if not drop_invalid and str(reason) != EMPTY:
        raise DataError(
            f"{piece.name} of {source.label} in data.sources is {reason}: mend it, or set data.drop_invalid to "
            "true to leave out and count what cannot be read."
        )


def content_of(piece: Piece, source: Source) -> tuple[Content, int]:
    """What a piece says, and its size in bytes. Raises UnusableError."""
    content = piece.content
    if isinstance(content, TooLong):
        raise UnusableError(f"longer than {content.limit:,} bytes (data.max_record_bytes)")
    if isinstance(content, np.ndarray):
        if not len(content):
            raise UnusableError(EMPTY)
        return content, content.nbytes
    text = None if content is None else _decoded(content)
    if text is not None and piece.kind == "lines":
        if source.chat_template is not None:
            return _conversation(text), len(text.encode())
        text = _field(text, source.text_key)
    if text is None:
        raise UnusableError(f"without text under {source.text_key!r} (text_key)")
    if not text and piece.first and piece.last:
        raise UnusableError(EMPTY)
    try:
        return text, len(text.encode())
    except UnicodeEncodeError as error:  # half a character, which JSON writes as "\ud800"
        raise UnusableError("not UTF-8 text") from error


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableError("not UTF-8 text") from error


def _conversation(line: str) -> Conversation:
    try:
        conversation = read_conversation(_json(line))
        conversation.text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError("not UTF-8 text") from error
    except DataError as error:
        raise UnusableError(f"no conversation: {error}") from error
    return conversation


def _field(line: str, key: str) -> str | None:
    record = _json(line)
    text = record.get(key) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableError("not JSON") from error
