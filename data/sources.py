"""What the configuration's sources are on the disk: files of some kind, by name, size and content."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from farspan.data.errors import DataError
from farspan.data.text import PYTHON_STDLIB, Document, standard_library, text_files

Kind = Literal["text", "lines", "parquet", "arrow", "tokens"]
TEXT_SUFFIXES = (".txt", ".md", ".py")
MAX_RECORD_BYTES = 64 << 20
_RECORDS: dict[str, Kind] = {".jsonl": "lines", ".jsonl.gz": "lines", ".jsonl.zst": "lines", ".parquet": "parquet"}
_BLOCK = 1 << 22  # bytes hashed at once


@dataclass(frozen=True)
class Source:
    """One entry of `data.sources`.

    path: a file, a folder, a prefix of `.bin` and `.idx`, or the word `python-stdlib`.
    name: how reports and blends call it; the last part of the path when None, or all of it where that is not unique.
    text_key: the field of a `.jsonl` line, or the column of a table, that holds the text.
    as_one_document: the text files of a folder, one after the other by name, are one long document.
    suffixes: of the files that are text in a folder.
    chat_template: lines of `.jsonl` are conversations, which this `ChatTemplate` makes text of.
    """

    path: str
    name: str | None = None
    text_key: str = "text"
    as_one_document: bool = False
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    chat_template: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.name is not None else self.path

    @property
    def reading(self) -> tuple[str, bool, str | None]:
        """How its files become documents."""
        return self.text_key, self.as_one_document, self.chat_template


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was listed. `name` is its path within its source, `digest` the sha256 of its content
    (of both files, for `.bin` and `.idx`)."""

    path: Path
    name: str
    kind: Kind
    size: int
    modified: int  # nanoseconds
    digest: str = ""

    def check_unchanged(self) -> None:
        """Raises DataError when the file is no longer what was listed."""
        status = os.stat(self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified):
            raise DataError(f"{self.path} of data.sources changed while it was prepared: prepare again.")


@dataclass(frozen=True)
class Listing:
    """A source and its files, in the order in which they are read; `name` is its own or comes from its path."""

    name: str
    source: Source
    files: tuple[InputFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def list_sources(sources: Sequence[str | Source]) -> list[Listing]:
    """The files of each source, no file twice; nothing is read yet.

    Raises DataError when a source does not exist or holds nothing that can be read, and when two have the same name, or
    would read the same files in two ways.
    """
    if not sources:
        raise DataError(f"data.sources is empty: give files, folders or the word {PYTHON_STDLIB}.")
    seen: dict[Path, Source] = {}
    listings = []
    for name, source in _named(sources):
        files: list[InputFile] = []
        other: Source | None = None  # has read files of this one in another way
        for file in _files_of(source):
            if source.as_one_document and file.kind != "text":
                raise DataError(
                    f"data.sources: {file.name} of {source.label} is no text file, and only these go with "
                    "as_one_document: leave it out of the source, or leave out as_one_document."
                )
            if source.chat_template is not None and file.kind != "lines":
                raise DataError(
                    f"data.sources: {source.label} has a chat_template, but {file.name} is no .jsonl file of "
                    "conversations: leave it out of the source, or leave out the chat_template."
                )
            real = file.path.resolve()
            if real not in seen:
                seen[real] = source
                files.append(file)
            elif seen[real].reading != source.reading:
                other = seen[real]
        if other is not None and not files:
            raise DataError(
                f"data.sources: all of {source.label} is in {other.label} as well, which reads it with another "
                "text_key, as_one_document or chat_template, and no file is read twice: leave one out, or put this "
                "one first."
            )
        listings.append(Listing(name, source, tuple(files)))
    return listings


def files_left_out(listing: Listing) -> str:
    """How many files of a folder are no text by their names, such as "2 .rst and 1 .gz files"; "" if there are none."""
    path, taken = Path(listing.source.path).expanduser(), {file.name for file in listing.files}
    if not path.is_dir() or listing.source.path == PYTHON_STDLIB or any(file.kind == "arrow" for file in listing.files):
        return ""
    suffixes = tuple(suffix.lower() for suffix in _suffixes(listing.source))
    others = [file for file in text_files(path, ("",)) if not file.name.lower().endswith(suffixes)]
    counts = Counter(file.path.suffix.lower() or "nameless" for file in others if file.name not in taken)
    most = counts.most_common(5)
    parts = [f"{count} {suffix}" for suffix, count in most]
    rest = counts.total() - sum(count for _, count in most)
    parts += [f"{rest} other"] if rest else []
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
    return f"{listed} files, which data.sources.suffixes do not name" if parts else ""


def hash_files(listings: Sequence[Listing], done: Callable[[int], None]) -> list[Listing]:
    """The listings with the digests of all files. `done` hears how many bytes were read, now and then."""
    return [replace(each, files=tuple(_hashed(file, done) for file in each.files)) for each in listings]


def _hashed(file: InputFile, done: Callable[[int], None]) -> InputFile:
    digest = hashlib.sha256()
    for path in (file.path, file.path.with_suffix(".idx")) if file.kind == "tokens" else (file.path,):
        try:
            with path.open("rb") as content:
                while block := content.read(_BLOCK):
                    digest.update(block)
                    done(len(block))
        except OSError as error:
            raise DataError(f"{path} of data.sources cannot be read: {error.strerror}.") from error
    return replace(file, digest=digest.hexdigest())


def _named(sources: Sequence[str | Source]) -> list[tuple[str, Source]]:
    listed = [Source(source) if isinstance(source, str) else source for source in sources]
    names = [source.name or Path(source.path).name for source in listed]
    names = [source.path if names.count(name) > 1 and not source.name else name for source, name in zip(listed, names)]
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"data.sources has {count} sources that are called {name!r}: give them a name each.")
    return list(zip(names, listed))


def _files_of(source: Source) -> Iterator[InputFile]:
    path = Path(source.path).expanduser()
    if source.path == PYTHON_STDLIB:
        yield from _text(standard_library(), source)
    elif path.is_file() and path.suffix not in (".bin", ".idx"):
        yield _input(path, path.name, _kind(path.name))
    elif path.is_dir() and _prefix(path) is not None:
        raise DataError(
            f"data.sources names {source.path!r}, which is a folder, and tokens are in {path.name}.bin beside it: "
            f"name {source.path}.bin, or move one of the two."
        )
    elif path.is_dir():
        yield from _folder(path, source)
    elif (prefix := _prefix(path)) is not None:
        yield _input(prefix.with_name(prefix.name + ".bin"), prefix.name, "tokens")
    else:
        raise DataError(
            f"data.sources names {source.path!r}, which is no file or folder here: give a file, a folder or "
            f"the word {PYTHON_STDLIB}."
        )


def _folder(path: Path, source: Source) -> Iterator[InputFile]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise DataError(
            f"data.sources: {source.path} holds several datasets ({', '.join(splits)}): name one, such as "
            f"{path / (splits or ['train'])[0]}."
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for part in state["_data_files"]:
            yield _input(path / part["filename"], part["filename"], "arrow")
        return
    documents = text_files(path, _suffixes(source))
    if not documents:
        raise DataError(
            f"data.sources names the folder {source.path!r}, which holds no {' or '.join(source.suffixes)} file."
        )
    yield from _text(documents, source)


def _suffixes(source: Source) -> tuple[str, ...]:
    """Of the files of a folder that are read."""
    return (*source.suffixes, *(() if source.as_one_document else _RECORDS))


def _text(documents: Sequence[Document], source: Source) -> Iterator[InputFile]:
    for document in documents:
        yield _input(document.path, document.name, _kind(document.name))


def _kind(name: str) -> Kind:
    if name.lower().endswith((".gz", ".zst")) and not name.lower().endswith(tuple(_RECORDS)):
        raise DataError(f"data.sources: {name} is compressed, which only .jsonl may be: unpack it first.")
    return next((kind for suffix, kind in _RECORDS.items() if name.lower().endswith(suffix)), "text")


def _prefix(path: Path) -> Path | None:
    """What stands before `.bin` and `.idx`, where both are."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    both = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    return prefix if all(file.is_file() for file in both) else None


def _input(path: Path, name: str, kind: Kind) -> InputFile:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} of data.sources cannot be read: {error.strerror}.") from error
    return InputFile(path, name, kind, status.st_size, status.st_mtime_ns)
