"""What one preparation has to do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from farspan.data.chat_template import ChatTemplate
from farspan.data.errors import DataError
from farspan.data.publish import digest
from farspan.data.sources import Listing
from farspan.data.texts import Text, read_texts
from farspan.data.tokenizers import open_tokenizer


@dataclass(frozen=True)
class Job:
    """The arguments of `prepare`, and the files that they speak of."""

    listings: Sequence[Listing]
    tokenizer: Path | None
    vocabulary_size: int
    end_of_document: str | None
    heldout_fraction: float
    seed: int
    drop_invalid: bool
    max_record_bytes: int
    processes: int
    report: Callable[[str], None]
    terminal: TextIO | None

    def texts(self) -> Iterator[Text]:
        return read_texts(self.listings, self.max_record_bytes, self.drop_invalid)

    @property
    def size(self) -> int:
        return sum(listing.size for listing in self.listings)

    @property
    def tokenizer_name(self) -> str:
        huggingface = self.tokenizer is not None and self.tokenizer.suffix == ".json"
        return "tokenizer.json" if huggingface else "tokenizer.model"

    def inputs(self) -> dict[str, object]:
        """All that decides what the files will hold."""
        if self.tokenizer is not None:
            opened = open_tokenizer(self.tokenizer, self.end_of_document)
            tokenizer = f"{opened.digest}, documents end with {opened.end_of_document}"
        elif self.end_of_document is not None:
            raise DataError("data.end_of_document is a piece of a tokenizer that is given: set data.tokenizer as well.")
        else:
            self._check_that_all_is_text()
            tokenizer = f"trained, {self.vocabulary_size} pieces"
        documents = [
            [
                listing.source.name,
                listing.source.text_key,
                listing.source.as_one_document,
                listing.source.chat_template and ChatTemplate(listing.source.chat_template).text,
                [[file.name, file.size, file.digest] for file in listing.files],
            ]
            for listing in self.listings
        ]
        return {
            "documents": digest(documents),
            "seed": self.seed,
            "heldout_fraction": self.heldout_fraction,
            "tokenizer": tokenizer,
            "longest_record": self.max_record_bytes if self.drop_invalid else None,
        }

    def _check_that_all_is_text(self) -> None:
        for listing in self.listings:
            if any(file.kind == "tokens" for file in listing.files):
                raise DataError(
                    f"data.sources: {listing.name} holds tokens already: set data.tokenizer to the one that made them."
                )
