"""Megatron's token files: `NAME.bin` has the tokens of all documents, `NAME.idx` says where each of them lies.

The index, all little-endian: the nine bytes of `_MAGIC`; the version, 1, as uint64; a code for the tokens' dtype as
uint8; the number of sequences as uint64; the number of document boundaries (one more than documents) as uint64; then
the length of each sequence in tokens as int32, its place in the `.bin` in bytes as int64, and the boundaries of
documents in sequences as int64. What is written here has one sequence a document.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError

LONGEST_DOCUMENT = (1 << 31) - 1  # tokens: lengths are int32
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_AT_ONCE = 1 << 20  # documents whose entries are in memory together


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The dtype in which Megatron stores tokens of a vocabulary."""
    return np.dtype("<u2" if vocabulary_size < 65_500 else "<i4")


def write_index(path: Path, lengths: NDArray[np.int64], dtype: np.dtype) -> None:
    """Writes the `.idx` of documents of `lengths` tokens [documents], which lie one after the other in the `.bin`."""
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for some in _slices(lengths):
            file.write(some.astype("<i4").tobytes())
        start = 0
        for some in _slices(lengths):
            ends = start + np.cumsum(some) * dtype.itemsize
            file.write((ends - some * dtype.itemsize).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, len(lengths) + 1, _AT_ONCE):
            file.write(np.arange(first, min(first + _AT_ONCE, len(lengths) + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


def _slices(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (lengths[first : first + _AT_ONCE] for first in range(0, len(lengths), _AT_ONCE))


class TokenFile:
    """The documents of `prefix.bin` and `prefix.idx`, memory-mapped.

    lengths: int64 [documents], tokens in each; a document of several sequences has them all.
    Raises DataError when a file is missing, the index is none, or the two do not go together.
    """

    def __init__(self, prefix: Path) -> None:
        self.bin = prefix.with_name(prefix.name + ".bin")
        index = prefix.with_name(prefix.name + ".idx")
        try:
            with index.open("rb") as file:
                self.dtype, sequences, boundaries = _read_header(file, index)
                lengths = _read(file, index, np.dtype("<i4"), sequences).astype(np.int64)
                pointers = _read(file, index, np.dtype("<i8"), sequences)
                documents = _read(file, index, np.dtype("<i8"), boundaries)
                left = len(file.read(1))
            size = self.bin.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error
        ends = np.cumsum(lengths) * self.dtype.itemsize
        if left or len(documents) == 0 or documents[0] != 0 or documents[-1] != sequences or np.any(lengths < 0):
            raise DataError(f"{index} is damaged: its parts contradict each other.")
        if np.any(np.diff(documents) < 0) or not np.array_equal(pointers, ends - lengths * self.dtype.itemsize):
            raise DataError(f"{index} is damaged, or its documents do not lie one after the other in {self.bin.name}.")
        total = int(ends[-1]) if sequences else 0
        if size != total:
            raise DataError(
                f"{self.bin} has {size:,} bytes, but {index.name} speaks of {total:,}: the file is cut, or the index "
                "belongs to another one."
            )
        self._starts = np.append(np.int64(0), np.cumsum(lengths))[documents]  # of documents, and the end, in tokens
        self.lengths: NDArray[np.int64] = np.diff(self._starts)
        self._tokens = np.memmap(self.bin, self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` (half-open) of a document, int64 [stop - start]. Raises IndexError outside of it."""
        if not 0 <= start <= stop <= self.lengths[document]:
            raise IndexError(f"Document {document} has {self.lengths[document]} tokens, not {start} to {stop}.")
        first = int(self._starts[document])
        return np.asarray(self._tokens[first + start : first + stop]).astype(np.int64)

    def last_tokens(self) -> NDArray[np.integer]:
        """The last token of each document, [documents]; -1 for one without tokens."""
        if not len(self._tokens):
            return np.full(len(self.lengths), -1)
        last: NDArray[np.integer] = self._tokens[np.maximum(self._starts[1:] - 1, 0)]
        return np.where(self.lengths > 0, last.astype(np.int64), -1)

    def chunks(self, tokens: int) -> Iterator[NDArray[np.integer]]:
        """All tokens in the order of the file, at most so many at a time."""
        for first in range(0, len(self._tokens), tokens):
            yield np.asarray(self._tokens[first : first + tokens])


def _read_header(file: BinaryIO, path: Path) -> tuple[np.dtype, int, int]:
    content = file.read(_HEADER.size)
    magic, version, code, sequences, boundaries = _HEADER.unpack(content.ljust(_HEADER.size, b"\0"))
    if magic != _MAGIC or version != 1:
        raise DataError(f"{path} is no index of Megatron's token files.")
    if code not in _DTYPES:
        raise DataError(f"{path} says that tokens have dtype number {code}, which is none of whole numbers.")
    entries = (os.fstat(file.fileno()).st_size - _HEADER.size) // 8
    if max(sequences, boundaries) > entries:
        raise DataError(f"{path} is cut: it speaks of {sequences:,} sequences and has room for {entries:,} entries.")
    return _DTYPES[code], sequences, boundaries


def _read(file: BinaryIO, path: Path, dtype: np.dtype, count: int) -> NDArray[np.int64]:
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise DataError(
            f"{path} is cut: {count:,} entries were expected and {len(content) // dtype.itemsize:,} are there."
        )
    return np.frombuffer(content, dtype)
