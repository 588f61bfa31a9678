"""A SentencePiece BPE tokenizer that gives back every text exactly.

SentencePiece writes a space as the mark U+2581 inside its pieces, so a U+2581 in the text itself would come back as
a space. Here it is encoded as the three pieces of its UTF-8 bytes, which every model with byte fallback has; and
decoding joins the bytes of the pieces, where only the mark inside a whole piece is a space. Nothing is escaped and
the model file stays an ordinary one.
"""

import hashlib
import heapq
import io
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.files import write_whole
from farspan.data.segments import segments

EOD = "<eod>"
_SPACE_MARK = "\u2581"
_CHUNK = 4096  # characters of one training "sentence"
_PROBE = f" \t a  b\r\n\n\x00 {_SPACE_MARK} {EOD}<unk><0x41>\ufeff\U0001f600é  "


class Tokenizer:
    """Text to token ids and back, with `decode(encode(text)) == text` for every text.

    `end_of_document` is the control piece whose id ends documents.
    Raises DataError when the file is missing, is no SentencePiece model, or is one that cannot keep that promise.
    """

    def __init__(self, path: Path, end_of_document: str = EOD) -> None:
        model = read_tokenizer(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"data.tokenizer: {path} is not a SentencePiece model.") from error

        self.digest: str = hashlib.sha256(model).hexdigest()
        self.vocabulary_size: int = self._processor.GetPieceSize()
        self.end_of_document = end_of_document
        self.eod: int = self._processor.PieceToId(end_of_document) if self.vocabulary_size else 0
        if self.vocabulary_size == 0 or not self._processor.IsControl(self.eod):
            raise DataError(
                f"data.tokenizer: {path} has no control piece {end_of_document} to end documents with. "
                "Set data.end_of_document to one that it has, or leave data.tokenizer out to train one on data.sources."
            )
        pieces = {self._processor.IdToPiece(token): token for token in range(self.vocabulary_size)}
        self.special_tokens: dict[str, int] = {
            piece: token for piece, token in pieces.items() if self._processor.IsControl(token)
        }
        self._bytes = [self._bytes_of(token) for token in range(self.vocabulary_size)]
        token_of_byte = {value: token for token, value in enumerate(self._bytes) if self._processor.IsByte(token)}
        if len(token_of_byte) < 256:
            raise DataError(
                f"data.tokenizer: {path} has no byte fallback, so some texts have no tokens. "
                "Leave data.tokenizer out to train one on data.sources."
            )
        self._space_mark = np.array([token_of_byte[bytes([byte])] for byte in _SPACE_MARK.encode()], np.int32)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise DataError(
                f"data.tokenizer: {path} changes text (its normaliser is not the identity, or it adds or removes "
                "spaces). Leave data.tokenizer out to train one on data.sources."
            )

    def encode(self, text: str) -> NDArray[np.int32]:
        """The token ids of a text, int32 [tokens], without the end-of-document token.

        Text that looks like a special piece (`<eod>`, `<unk>`) is text. Raises UnicodeEncodeError for a lone surrogate.
        """
        parts = [np.empty(0, np.int32)]
        for number, run in enumerate(text.split(_SPACE_MARK)):
            if number > 0:
                parts.append(self._space_mark)
            parts.extend(self._processor.EncodeAsNumpy(segment.encode()) for segment in segments(run))
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids [tokens]; end-of-document tokens are dropped.

        Bytes that are no whole UTF-8 character (a sequence cut within one) and unknown tokens become U+FFFD.
        Raises IndexError for an id outside the vocabulary.
        """
        tokens = np.asarray(ids, np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocabulary_size):
            raise IndexError(
                f"Token ids go from 0 to {self.vocabulary_size - 1}, not {tokens.min()} to {tokens.max()}."
            )
        return b"".join(self._bytes[token] for token in tokens.tolist()).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        piece: str = self._processor.IdToPiece(token)
        if self._processor.IsByte(token):
            return bytes([int(piece[1:-1], 16)])  # written <0x41>
        if self._processor.IsControl(token):
            return b""
        if self._processor.IsUnknown(token):
            return "\ufffd".encode()
        return piece.replace(_SPACE_MARK, " ").encode()


def train_tokenizer(
    documents: Iterable[str],
    path: Path,
    vocabulary_size: int,
    *,
    threads: int,
    seed: int,
    sample_bytes: int = 8_000_000,
) -> None:
    """Trains a byte-pair encoding on an even sample of the documents (at most `sample_bytes`) and writes it to `path`.

    The file is a pure function of the arguments. `threads` is one of them only because SentencePiece writes that
    number into the file: keep it the same where digests are compared.

    Raises DataError when there is no text or it cannot give `vocabulary_size` pieces.
    """
    sample = _sample(documents, seed, sample_bytes)
    if not sample:
        raise DataError("data.sources hold no text to train a tokenizer on: add files that are not empty.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            character_coverage=0.9995,  # rarer characters are written in bytes
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            control_symbols=[EOD],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _CHUNK,  # bytes; longer ones would be left out without a word
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # what follows the C++ file and line
        raise DataError(
            f"data.vocabulary_size is {vocabulary_size}, but no tokenizer of that size fits this text: {reason}"
        ) from error
    write_whole(path, model.getvalue())


def read_tokenizer(path: Path) -> bytes:
    """The content of a tokenizer's file. Raises DataError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.tokenizer: {path} cannot be read ({error.strerror}). Give a SentencePiece model or a Hugging Face "
            "tokenizer.json, or leave data.tokenizer out to train one on data.sources."
        ) from error


def _sample(documents: Iterable[str], seed: int, sample_bytes: int) -> list[str]:
    """Chunks drawn evenly from all the text, in their order: those with the highest of one random number each."""
    generator = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    kept_bytes = 0
    chunks = (text[start : start + _CHUNK] for text in documents for start in range(0, len(text), _CHUNK))
    for number, chunk in enumerate(chunks):
        heapq.heappush(kept, (generator.random(), number, chunk))
        kept_bytes += len(chunk.encode())
        while kept_bytes > sample_bytes:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    # The trainer leaves out a whole sentence that holds U+2585, its own mark for unknown.
    return [chunk.replace("\u2585", " ") for _, _, chunk in sorted(kept, key=lambda entry: entry[1])]
