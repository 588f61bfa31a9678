"""Files to documents, one after the other: text, lines of JSON, tables, and tokens.

A document is read whole, or in pieces when it is long, so that memory does not grow with the files.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.indexed import TokenFile
from farspan.data.segments import last_cut
from farspan.data.sources import InputFile, Kind, Listing
from farspan.data.tables import columns, need_pyarrow

_PIECE = 1 << 19  # bytes of a long text that are read at once, and tokens of a long document


class Position(NamedTuple):
    """Where to go on: so many files are done, and so many lines or rows of the next one, which end at byte `offset`
    of its content."""

    files: int = 0
    records: int = 0
    offset: int = 0


class TooLong(NamedTuple):
    """Stands for a record that was not read, of more than `limit` bytes."""

    limit: int


class Piece(NamedTuple):
    """A document, or a part of a long one.

    kind: of its file.
    name: the document's, within its source; a record has its number behind a colon, lines from 1 and rows from 0.
    content: UTF-8 text (None for a row that is null), a line of JSON, or tokens, as the file has it.
    first, last: whether the document begins and ends here.
    after: where reading goes on after this piece, if it is the last one of its document.
    read: bytes of the source's files that are done with, about.
    """

    kind: Kind
    name: str
    content: bytes | NDArray[np.integer] | TooLong | None
    first: bool
    last: bool
    after: Position
    read: int


def read_source(listing: Listing, start: Position, longest: int) -> Iterator[Piece]:
    """The documents of a source from `start` on; a record of more than `longest` bytes is TooLong.

    Raises DataError when a file changes, is damaged, or has another layout than its name says.
    """
    if listing.source.as_one_document:
        if start.files == 0:
            yield from _one_document(listing, longest)
        return
    before = sum(file.size for file in listing.files[: start.files])
    for number, file in enumerate(listing.files[start.files :], start.files):
        here = start if number == start.files else Position(number)
        with _named_errors(file):
            for piece in _read_file(file, here, listing.source.text_key, longest):
                yield piece._replace(read=before + piece.read)
        before += file.size


def _read_file(file: InputFile, start: Position, text_key: str, longest: int) -> Iterator[Piece]:
    if file.kind == "text":
        return _text(file, start, longest)
    if file.kind == "lines":
        return _lines(file, start, longest)
    if file.kind == "tokens":
        return _tokens(file, start)
    return _rows(file, start, text_key, longest)


def _one_document(listing: Listing, longest: int) -> Iterator[Piece]:
    """All files as one text; where one does not end its last line, that is done."""
    files = [file for file in listing.files if file.size]
    before = 0
    for number, file in enumerate(files):
        opens, closes = number == 0, number == len(files) - 1
        with _named_errors(file):
            for piece in _text(file, Position(), longest):
                content = piece.content
                assert isinstance(content, bytes | TooLong)
                if piece.last and not closes and isinstance(content, bytes) and not content.endswith(b"\n"):
                    content += b"\n"
                yield Piece(
                    file.kind,
                    listing.name,
                    content,
                    piece.first and opens,
                    piece.last and closes,
                    Position(len(listing.files)),
                    before + piece.read,
                )
        before += file.size


def _text(file: InputFile, start: Position, longest: int) -> Iterator[Piece]:
    after = Position(start.files + 1)
    with _open_unchanged(file) as content:
        rest, first, last = b"", True, False
        while not last:
            block = content.read(_PIECE)
            searched, rest = len(rest), rest + block
            last = not block or content.tell() >= file.size
            cut = len(rest) if last else last_cut(rest, searched)
            if cut == 0 and len(rest) > longest:
                yield Piece(file.kind, file.name, TooLong(longest), first, True, after, file.size)
                return
            if cut or last:
                yield Piece(file.kind, file.name, rest[:cut], first, last, after, content.tell())
                rest, first = rest[cut:], False


def _lines(file: InputFile, start: Position, longest: int) -> Iterator[Piece]:
    with _open_unchanged(file) as raw, _decompressed(raw, file.path) as content:
        _skip(content, start.offset)
        number, offset = start.records, start.offset
        while line := content.readline(longest + 1):
            number, offset = number + 1, offset + len(line)
            record: bytes | TooLong = line
            if len(line) > longest:
                record = TooLong(longest)
                while line and not line.endswith(b"\n"):
                    line = content.readline(_PIECE)
                    offset += len(line)
            elif not line.strip():
                continue
            position = Position(start.files, number, offset)
            yield Piece(file.kind, f"{file.name}:{number}", record, True, True, position, raw.tell())


def _rows(file: InputFile, start: Position, text_key: str, longest: int) -> Iterator[Piece]:
    file.check_unchanged()
    number = start.records
    for column, rows in columns(file, start.records, text_key):
        for text in column.to_pylist():
            number += 1
            content = TooLong(longest) if text is not None and len(text) > longest else text
            name, position = f"{file.name}:{number - 1}", Position(start.files, number)
            yield Piece(file.kind, name, content, True, True, position, file.size * number // rows)
    file.check_unchanged()


def _tokens(file: InputFile, start: Position) -> Iterator[Piece]:
    tokens = TokenFile(file.path.with_suffix(""))
    size = tokens.dtype.itemsize
    done = int(tokens.lengths[: start.records].sum())
    for document in range(start.records, len(tokens.lengths)):
        length, position = int(tokens.lengths[document]), Position(start.files, document + 1)
        for first in range(0, max(length, 1), _PIECE):
            stop = min(first + _PIECE, length)
            content = tokens.read(document, first, stop)
            name, read = f"{file.name}:{document}", (done + stop) * size
            yield Piece(file.kind, name, content, first == 0, stop == length, position, read)
        done += length
    file.check_unchanged()


@contextmanager
def _open_unchanged(file: InputFile) -> Iterator[BinaryIO]:
    file.check_unchanged()
    with file.path.open("rb") as content:
        yield content
    file.check_unchanged()


@contextmanager
def _decompressed(raw: BinaryIO, path: Path) -> Iterator[io.BufferedIOBase]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        yield gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        need_pyarrow(path)
        import pyarrow

        yield io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _PIECE)
    else:
        yield raw  # type: ignore[misc] # a file opened in binary mode is one


def _skip(content: io.BufferedIOBase, offset: int) -> None:
    while offset > 0:
        block = content.read(min(offset, _PIECE))
        if not block:
            return
        offset -= len(block)


@contextmanager
def _named_errors(file: InputFile) -> Iterator[None]:
    """What libraries say of a damaged file becomes one line that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file.path} of data.sources cannot be read to its end: {reason}.") from error
    except ValueError as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{file.path} of data.sources is damaged: {reason}.") from error
