import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from farspan.data.errors import DataError
from farspan.data.prepare import Prepared
from farspan.data.text import read_document, standard_library, text_files
from farspan.data.tokenizer import Tokenizer, train_tokenizer

NASTY = [
    "",
    " ",
    "  leading and trailing  ",
    "runs      of          spaces",
    "\tone\t\ttwo\n\n\n\tthree\r\nfour\rfive\x0b\x0c\x85\u2028",
    "\x00",
    "a\x00b\x00",
    "\u2581",
    "\u2581\u2581 \u2581 a\u2581b \u2581",
    "\u2585 \u2047",
    "<eod><unk><s></s><0x41>\\u2581",
    "😀👩\u200d👩\u200d👧 é e\u0301 ﬁ ① \uff21 漢字 \u202eabc",
    "\ufeff\ufffe\uffff\ufffd\U0010ffff\ue000",
    "1234567890 3.14159",
    "x" * 200_000,
    " " * 200_000,
    "word \u2581" * 30_000,
]


@pytest.fixture(scope="module")
def tokenizer(prepared: Prepared) -> Tokenizer:
    return Tokenizer(prepared.tokenizer_path)


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:12]))
def test_nasty_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text


def test_every_character_of_unicode_comes_back(tokenizer: Tokenizer) -> None:
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_part_of_every_file_of_the_standard_library_comes_back(tokenizer: Tokenizer) -> None:
    places = random.Random(0)
    for path in (document.path for document in standard_library()):
        text = read_document(path)
        start = places.randrange(max(1, len(text) - 4000))
        assert tokenizer.decode(tokenizer.encode(text[start : start + 4000])) == text[start : start + 4000], path


@pytest.mark.full
def test_every_file_of_the_standard_library_comes_back(tokenizer: Tokenizer) -> None:
    for path in (document.path for document in standard_library()):
        text = read_document(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text, path


def test_long_texts_have_the_tokens_that_the_model_gives_them_whole(tokenizer: Tokenizer, prepared: Prepared) -> None:
    text = "\n".join(read_document(document.path) for document in standard_library()[:20])
    assert len(text) > 200_000
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared.tokenizer_path))
    assert tokenizer.encode(text).tolist() == model.encode(text)


def test_whitespace_is_learnt_and_special_pieces_are_not_read_from_text(tmp_path: Path) -> None:
    text = "def f(x):\n\tif x:\n\t\treturn <eod>\n\n    return <unk>\n"
    other = "import os, sys\nfor name in names: print(name, len(name))\n"  # rarer: merged after all of the text
    train_tokenizer([text * 200, other * 50], tmp_path / "model", 310, threads=1, seed=0)
    tokenizer = Tokenizer(tmp_path / "model")
    assert tokenizer.vocabulary_size == 310
    # Which merges come first differs between SentencePiece's versions; bytes would be one token a character.
    assert len(tokenizer.encode("\n\t\t")) < 3
    assert len(tokenizer.encode("    ")) < 4
    assert tokenizer.eod not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_drops_the_end_of_documents_and_marks_cut_characters(tokenizer: Tokenizer) -> None:
    one, two = tokenizer.encode("one"), tokenizer.encode("two 漢")
    assert tokenizer.decode([*one, tokenizer.eod, *two, tokenizer.eod]) == "onetwo 漢"
    assert tokenizer.decode(two[:-1]) == "two \ufffd"
    assert tokenizer.decode([]) == ""
    with pytest.raises(IndexError, match="-100"):
        tokenizer.decode([5, -100])
    with pytest.raises(IndexError, match="0 to 799"):
        tokenizer.decode([800])


def test_training_is_a_pure_function_of_documents_and_seed(tmp_path: Path, texts: Path) -> None:
    documents = [read_document(document.path) for document in text_files(texts, (".py", ".txt"))]
    digests = []
    for number, seed in enumerate([7, 7, 8]):
        path = tmp_path / str(number)
        train_tokenizer(iter(documents), path, 600, threads=1, seed=seed, sample_bytes=100_000)
        digests.append(Tokenizer(path).digest)
        assert digests[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_texts_with_marks_of_sentencepiece_are_not_left_out_of_training(tmp_path: Path) -> None:
    text = "wonderful \u2585 \u2581 \x00 weather\n"
    train_tokenizer([text * 500], tmp_path / "model", 297, threads=1, seed=0)
    tokenizer = Tokenizer(tmp_path / "model")
    assert len(tokenizer.encode("wonderful")) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_vocabulary_size_that_does_not_fit_the_text_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match=rf"data\.vocabulary_size is {size}.*Vocabulary size"):
        train_tokenizer(["some words " * 50], tmp_path / "model", size, threads=1, seed=0)
    assert not (tmp_path / "model").exists()


def test_training_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources"):
        train_tokenizer(["", ""], tmp_path / "model", 297, threads=1, seed=0)


def _other_model(path: Path, **changes: object) -> Path:
    options: dict[str, object] = {
        "sentence_iterator": iter(["some words and more of them"] * 100),
        "model_type": "bpe",
        "vocab_size": 290,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "control_symbols": ["<eod>"],
        "minloglevel": 2,
    }
    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(**(options | {"model_writer": writer} | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"control_symbols": []}, "no control piece <eod>"),
        ({"byte_fallback": False, "vocab_size": 40}, "no byte fallback"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
    ],
)
def test_models_that_lose_text_or_cannot_end_documents_are_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    Tokenizer(_other_model(tmp_path / "good"))
    with pytest.raises(DataError, match=rf"data\.tokenizer.*{reason}"):
        Tokenizer(_other_model(tmp_path / "bad", **changes))


@pytest.mark.parametrize("content", [None, b"", b"not a model " * 100])
def test_a_missing_or_broken_model_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.tokenizer: .*some\.model"):
        Tokenizer(path)
