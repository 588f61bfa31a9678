"""A Hugging Face tokenizer, from its `tokenizer.json` alone."""

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.segments import segments
from farspan.data.tokenizer import read_tokenizer

# What the tokenizers of well-known models call it; a model that says otherwise is named in data.end_of_document.
_ENDS = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_PROBE = " \t a  b\r\n\n 12345 <unk>\U0001f600é  "


class HuggingFaceTokenizer:
    """Text to token ids and back, as `Tokenizer` does, by the library `tokenizers`.

    Text comes back exactly, but for what the file's own Unicode normalisation (such as NFC) makes of it.
    `end_of_document` is the added token whose id ends documents; None takes the usual one, where there is one.
    Raises DataError when the file is none of these, it loses text, or it is not clear what ends documents.
    """

    def __init__(self, path: Path, end_of_document: str | None = None) -> None:
        content = read_tokenizer(path)
        if find_spec("tokenizers") is None:
            raise DataError(f"data.tokenizer: {path} needs the package tokenizers: pip install 'farspan[data]'.")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data.processes says how many cores work
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises no narrower one
            raise DataError(f"data.tokenizer: {path} is not a Hugging Face tokenizer.json ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token is text

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.digest: str = hashlib.sha256(content).hexdigest()
        self.vocabulary_size: int = max(vocabulary.values(), default=0) + 1
        added = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.end_of_document = _choose_end(path, added, end_of_document)
        self.eod: int = added[self.end_of_document]
        self.special_tokens: dict[str, int] = added
        if self.decode(np.append(self.encode(_PROBE), self.encode(_PROBE))) != 2 * _PROBE:
            raise DataError(
                f"data.tokenizer: {path} changes text (it is not byte-level, or adds or removes spaces). Give one that "
                "is, as those of GPT-2, Llama 3 and Qwen are, or leave data.tokenizer out to train one on data.sources."
            )

    def encode(self, text: str) -> NDArray[np.int32]:
        """The token ids of a text, int32 [tokens], without the end-of-document token."""
        parts = [self._tokenizer.encode(segment, add_special_tokens=False).ids for segment in segments(text)]
        return np.concatenate([np.array(part, np.int32) for part in parts] or [np.empty(0, np.int32)])

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids [tokens]; end-of-document tokens are dropped, cut characters become U+FFFD.

        Raises IndexError for an id outside the vocabulary.
        """
        tokens = np.asarray(ids, np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocabulary_size):
            raise IndexError(
                f"Token ids go from 0 to {self.vocabulary_size - 1}, not {tokens.min()} to {tokens.max()}."
            )
        text: str = self._tokenizer.decode(tokens[tokens != self.eod].tolist(), skip_special_tokens=False)
        return text


def _choose_end(path: Path, added: dict[str, int], asked: str | None) -> str:
    found = [piece for piece in ([asked] if asked else _ENDS) if piece in added]
    if len(found) != 1:
        which = f"no added token {asked}" if asked else f"{' and '.join(found) or 'no usual token'} to end documents"
        raise DataError(
            f"data.tokenizer: {path} has {which}: set data.end_of_document to one of its added tokens "
            f"({', '.join(list(added)[:12]) or 'it has none'})."
        )
    return found[0]
