import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from farspan.data import huggingface
from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.huggingface import HuggingFaceTokenizer
from farspan.data.prepare import prepare
from farspan.data.text import read_document, standard_library
from farspan.data.tokenizers import open_tokenizer

TEXTS = [
    "",
    "plain words",
    " \t mixed   white\r\n\nspace ",
    "<|endoftext|> and <|im_start|> are text",
    "é e\u0301 漢字 😀👩\u200d👩 \u0000 \ufeff",
    "1234567890 " * 20_000,
    "x" * 100_000,
]


def _train(path: Path, special: list[str] | None = None) -> tokenizers.Tokenizer:
    """A byte-level one, as those of GPT-2 and its heirs."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"] if special is None else special
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    texts = (read_document(document.path) for document in standard_library()[:40])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    _train(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:12]))
def test_texts_come_back(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


def test_long_texts_have_the_tokens_that_the_library_gives_them_whole(
    tokenizer: HuggingFaceTokenizer, path: Path
) -> None:
    text = "\n".join(read_document(document.path) for document in standard_library()[:20])
    whole = tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    assert len(text) > 200_000
    assert tokenizer.encode(text).tolist() == whole


def test_what_the_file_adds_or_cuts_by_itself_is_left_out(path: Path, tmp_path: Path) -> None:
    changed = tokenizers.Tokenizer.from_file(str(path))
    changed.enable_truncation(8)
    changed.enable_padding(length=16)
    changed.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    changed.save(str(tmp_path / "tokenizer.json"))
    text = "some words that are more than eight tokens, and then some"
    ids = HuggingFaceTokenizer(tmp_path / "tokenizer.json").encode(text).tolist()
    assert ids == HuggingFaceTokenizer(path).encode(text).tolist()
    assert len(changed.encode(text).ids) == 16 != len(ids)


def test_a_normaliser_of_unicode_is_allowed(path: Path, tmp_path: Path) -> None:
    changed = tokenizers.Tokenizer.from_file(str(path))
    changed.normalizer = normalizers.NFC()
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


def test_ids_outside_the_vocabulary_are_refused(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(IndexError, match=f"0 to {tokenizer.vocabulary_size - 1}"):
        tokenizer.decode([tokenizer.vocabulary_size])


def test_the_end_of_documents_can_be_named(path: Path, tmp_path: Path) -> None:
    assert HuggingFaceTokenizer(path).end_of_document == "<|endoftext|>"
    assert HuggingFaceTokenizer(path, "<|im_start|>").eod == 1
    with pytest.raises(
        DataError, match=r"no added token <x>: set data\.end_of_document .*<\|endoftext\|>, <\|im_start\|>"
    ):
        HuggingFaceTokenizer(path, "<x>")
    for special, words in (["<|end|>"], "no usual token"), (["</s>", "<eos>"], "</s> and <eos>"), ([], "it has none"):
        _train(tmp_path / "tokenizer.json", special)
        with pytest.raises(DataError, match=words):
            HuggingFaceTokenizer(tmp_path / "tokenizer.json")


def test_tokenizers_that_change_text_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"data\.tokenizer: .* changes text"):
        HuggingFaceTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{}", '{"model": 5}', "\xff"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer\.json"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_the_library_is_asked_for_where_it_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package tokenizers: pip install 'farspan\[data\]'"):
        HuggingFaceTokenizer(path)


@pytest.mark.parametrize("processes", [1, 2])
def test_data_is_prepared_with_it(path: Path, tmp_path: Path, processes: int) -> None:
    rows = random.Random(0)
    texts = [" ".join(rows.choices(["some", "words", "<|endoftext|>", "漢", "\n"], k=50)) for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(
        [str(tmp_path / "a.jsonl")],
        tmp_path / "out",
        tokenizer=path,
        vocabulary_size=1,
        heldout_fraction=0.2,
        seed=0,
        end_of_document="<|im_start|>",
        processes=processes,
        report=lambda line: None,
    )
    assert (prepared.tokenizer_path.name, prepared.eod, prepared.end_of_document) == (
        "tokenizer.json",
        1,
        "<|im_start|>",
    )
    prepared.check_tokenizer(path)
    tokenizer, found = prepared.open_tokenizer(), []
    for split in ("train", "heldout"):
        corpus = Corpus(prepared, split)  # type: ignore[arg-type] # one of the two
        found += [tokenizer.decode(corpus.read(n, 0, int(length))) for n, length in enumerate(corpus.lengths)]
    assert sorted(found) == sorted(texts)
