"""Which kind of tokenizer a file holds."""

from pathlib import Path

from farspan.data.huggingface import HuggingFaceTokenizer
from farspan.data.tokenizer import EOD, Tokenizer

AnyTokenizer = Tokenizer | HuggingFaceTokenizer


def open_tokenizer(path: Path, end_of_document: str | None = None) -> AnyTokenizer:
    """A Hugging Face tokenizer when the file ends in `.json`, else a SentencePiece model.

    `end_of_document` is the piece that ends documents; None takes the kind's own. Raises DataError as they do.
    """
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, end_of_document)
    return Tokenizer(path, end_of_document or EOD)
