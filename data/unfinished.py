"""The folder in which a preparation grows, so that one that was killed goes on where it stopped.

    books.partial/train.bin, heldout.bin        tokens, as they will be
    books.partial/tokenizer.model               written whole or not at all
    books.partial/work/train.documents, ...     three int64 a document: its tokens, bytes of text and notes
    books.partial/work/train.notes, ...         notes of conversations, which are copied where there are some
    books.partial/work/journal.json             how far all this goes; what lies behind is cut off

The journal is replaced after what it speaks of has reached the disk.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from farspan.data.encoding import Encoded, Portion
from farspan.data.errors import DataError
from farspan.data.files import write_whole
from farspan.data.indexed import LONGEST_DOCUMENT
from farspan.data.pieces import Position
from farspan.data.prepared import SPLITS

_SECONDS = 2.0  # between two journals: what a kill can cost
_WORK = "work"
_RECORD = np.dtype("<i8")  # tokens, then bytes of text, then entries of its notes
_FIELDS = 3


class Unfinished:
    """What a preparation has written so far. Everything that `add` is given follows what is there.

    source, position: where the reading goes on.
    boundaries: for each source that is done, the documents of each split so far.
    dropped: for each source begun, how many documents were left out, by reason.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, object]) -> None:
        self.folder = folder
        self.source, self.position = 0, Position()
        self.boundaries: list[list[int]] = []
        self.dropped: list[Counter[str]] = []
        self._inputs = dict(inputs)
        self._part: _Part | None = None
        self._last_commit = time.monotonic()
        (folder / _WORK).mkdir(parents=True, exist_ok=True)
        journal = read_journal(folder)
        if journal is not None:
            self.source, self.position = journal["source"], Position(*journal["position"])
            self.boundaries = journal["boundaries"]
            self.dropped = [Counter(counts) for counts in journal["dropped"]]
        self._files: dict[str, BinaryIO] = {}
        for name in _growing():
            self._files[name] = (folder / name).open("ab")
            self._files[name].truncate(journal["bytes"][name] if journal is not None else 0)
            self._files[name].seek(0, os.SEEK_END)

    def add(self, portion: Portion, encoded: Encoded) -> None:
        """Appends the tokens of a portion, and after a while commits. Raises DataError for a document too long."""
        while len(self.dropped) <= portion.source:
            self.dropped.append(Counter())
        while self.source < portion.source:
            self._end_source()
        if portion.first and portion.last:
            self.dropped[portion.source].update(encoded.dropped)
            self._append(encoded)
        else:
            self._append_part(portion, encoded)
        self.position = portion.after
        if self._part is None and time.monotonic() - self._last_commit > _SECONDS:
            self.commit()

    def finish(self, sources: int) -> None:
        """All sources are read."""
        self.dropped.extend(Counter() for _ in range(len(self.dropped), sources))
        while self.source < sources:
            self._end_source()
        self.commit()

    def commit(self) -> None:
        """What was added so far will be found by whoever goes on."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        journal = {
            "inputs": self._inputs,
            "source": self.source,
            "position": self.position,
            "boundaries": self.boundaries,
            "dropped": self.dropped,
            "bytes": {name: file.tell() for name, file in self._files.items()},
        }
        write_whole(self.folder / _WORK / "journal.json", json.dumps(journal).encode())
        self._last_commit = time.monotonic()

    def documents(self, split: str) -> NDArray[np.int64]:
        """Tokens, bytes of text and entries of the notes of each document, int64 [documents, 3], memory-mapped."""
        return read_documents(self.folder / _documents(split))

    def notes(self, split: str) -> Path:
        """The file of all notes, one after the other, int32."""
        return self.folder / _notes(split)

    def close(self) -> None:
        """Without a commit: what was added since the last one is lost."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # the disk is full, which was said already
                continue

    def _append(self, encoded: Encoded) -> None:
        of_token = np.repeat(encoded.heldout, encoded.lengths)
        of_note = np.repeat(encoded.heldout, encoded.note_lengths)
        records = np.stack([encoded.lengths, encoded.sizes, encoded.note_lengths], axis=1).astype(_RECORD)
        if np.any(encoded.lengths > LONGEST_DOCUMENT):
            raise _too_long()
        for split, held in zip(SPLITS, (False, True)):
            self._files[f"{split}.bin"].write(encoded.tokens[of_token == held].tobytes())
            self._files[_notes(split)].write(encoded.notes[of_note == held].tobytes())
            self._files[_documents(split)].write(records[encoded.heldout == held].tobytes())

    def _append_part(self, portion: Portion, encoded: Encoded) -> None:
        """A piece of a document that is too long for one portion. When a piece is dropped, the whole document is."""
        if portion.first:
            self._part = _Part()
        part = self._part
        assert part is not None
        if encoded.dropped and not part.dropped:
            part.dropped = True
            self.dropped[portion.source].update(encoded.dropped)
            if part.tokens:
                file = self._files[f"{part.split}.bin"]
                file.flush()
                file.truncate(file.tell() - part.bytes)
                file.seek(0, os.SEEK_END)
        if len(encoded.lengths) and not part.dropped:
            part.split = SPLITS[int(encoded.heldout[0])]
            part.bytes += self._files[f"{part.split}.bin"].write(encoded.tokens.tobytes())
            part.tokens += int(encoded.lengths[0])
            part.size += int(encoded.sizes[0])
        if part.tokens > LONGEST_DOCUMENT:
            raise _too_long()
        if portion.last:
            if not part.dropped:
                record = np.array([part.tokens, part.size, 0], _RECORD)
                self._files[_documents(part.split)].write(record.tobytes())
            self._part = None

    def _end_source(self) -> None:
        counts = [self._files[_documents(split)].tell() // (_FIELDS * _RECORD.itemsize) for split in SPLITS]
        self.boundaries.append(counts)
        self.source, self.position = self.source + 1, Position()


class _Part:
    """The beginning of a long document: its split, and tokens, bytes in the file, and bytes of text so far."""

    def __init__(self) -> None:
        self.split = SPLITS[0]
        self.tokens = self.bytes = self.size = 0
        self.dropped = False


def is_work(folder: Path) -> bool:
    """Whether a folder was begun by an Unfinished."""
    return (folder / _WORK).is_dir()


def remove_work(folder: Path) -> None:
    """Leaves what is to be published."""
    if is_work(folder):
        shutil.rmtree(folder / _WORK)


def read_journal(folder: Path) -> dict[str, Any] | None:
    """The last journal; None where there is none, or files of it are missing, so that all begins again."""
    path = folder / _WORK / "journal.json"
    if not path.is_file():
        return None
    journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sizes = {name: (folder / name).stat().st_size for name in _growing() if (folder / name).is_file()}
    whole = all(sizes.get(name, -1) >= size for name, size in journal["bytes"].items())
    return journal if whole else None


def read_documents(path: Path) -> NDArray[np.int64]:
    if not path.stat().st_size:
        return np.empty((0, _FIELDS), _RECORD)
    return np.memmap(path, _RECORD, mode="r").reshape(-1, _FIELDS)


def _growing() -> list[str]:
    return [name for split in SPLITS for name in (f"{split}.bin", _documents(split), _notes(split))]


def _notes(split: str) -> str:
    return f"{_WORK}/{split}.notes"


def _documents(split: str) -> str:
    return f"{_WORK}/{split}.documents"


def _too_long() -> DataError:
    return DataError(
        f"a document of data.sources has more than {LONGEST_DOCUMENT:,} tokens, which the format of the token files "
        "cannot say: divide it."
    )
