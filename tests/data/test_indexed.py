"""Megatron's token files, with Megatron itself as the reference."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from farspan.data.errors import DataError
from farspan.data.indexed import TokenFile, token_dtype, write_index
from farspan.data.prepared import Prepared


def _megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: type) -> None:
    """Documents of several sequences each."""
    builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(sequence) for sequence in sequences])
    builder.finalize(str(prefix.with_suffix(".idx")))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    _megatron(tmp_path / "tokens", [[[1, 2, 3], [4]], [[5, 6]], [[7], [8], [9, 10]]], np.uint16)
    return tmp_path / "tokens"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 400, 2], list(range(1, 900))])
def test_an_index_is_megatrons_to_the_byte(tmp_path: Path, dtype: type, lengths: list[int]) -> None:
    _megatron(tmp_path / "theirs", [[range(length)] for length in lengths], dtype)
    write_index(tmp_path / "ours.idx", np.array(lengths), np.dtype(dtype))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_many_documents_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.arange(1, 101)
    write_index(tmp_path / "once.idx", lengths, np.dtype("<u2"))
    monkeypatch.setattr("farspan.data.indexed._AT_ONCE", 7)
    write_index(tmp_path / "parts.idx", lengths, np.dtype("<u2"))
    assert (tmp_path / "parts.idx").read_bytes() == (tmp_path / "once.idx").read_bytes()


@pytest.mark.parametrize("size", [300, 65_499, 65_500, 200_000])
def test_tokens_have_the_dtype_that_megatron_takes(size: int) -> None:
    assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


def test_documents_of_several_sequences_are_read_whole(pair: Path) -> None:
    file = TokenFile(pair)
    assert file.lengths.tolist() == [4, 2, 4]
    assert [file.read(number, 0, int(length)).tolist() for number, length in enumerate(file.lengths)] == [
        [1, 2, 3, 4],
        [5, 6],
        [7, 8, 9, 10],
    ]
    assert file.read(2, 1, 3).tolist() == [8, 9]
    assert file.last_tokens().tolist() == [4, 6, 10]
    with pytest.raises(IndexError):
        file.read(1, 0, 3)


def test_megatron_reads_what_was_prepared_and_writes_the_same(prepared: Prepared, tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        ours, theirs = TokenFile(prepared.directory / split), IndexedDataset(str(prepared.directory / split))
        assert len(theirs) == len(ours.lengths) == prepared.documents[split]
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        documents = [ours.read(number, 0, int(length)) for number, length in enumerate(ours.lengths)]
        assert all(np.array_equal(document, theirs[number]) for number, document in enumerate(documents))
        _megatron(tmp_path / split, [[document] for document in documents], np.uint16)
        for suffix in (".bin", ".idx"):
            written = (tmp_path / split).with_suffix(suffix).read_bytes()
            assert written == (prepared.directory / f"{split}{suffix}").read_bytes()


def test_megatrons_own_dataset_takes_samples_from_it(prepared: Prepared, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Vocabulary:
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012
        eod = prepared.eod
        vocab_size = prepared.vocabulary_size

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=128,
        blend=([str(prepared.directory / "train")], None),
        split="1,0,0",
        tokenizer=Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path),
    )
    low_level = IndexedDataset(str(prepared.directory / "train"))
    documents = np.arange(len(low_level), dtype=np.int32)
    dataset = GPTDataset(low_level, str(prepared.directory / "train"), documents, 40, Split.train, config)
    for step in range(10):
        sample = dataset[step]
        assert sample["tokens"].shape == (128,)
        assert int(sample["tokens"].max()) < prepared.vocabulary_size
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def test_a_cut_bin_and_an_index_of_another_file_are_noticed(pair: Path, tmp_path: Path) -> None:
    content = pair.with_suffix(".bin").read_bytes()
    pair.with_suffix(".bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"tokens\.bin has 18 bytes, but tokens\.idx speaks of 20"):
        TokenFile(pair)
    pair.with_suffix(".bin").write_bytes(content)
    write_index(pair.with_suffix(".idx"), np.array([4, 4]), np.dtype("<u2"))
    with pytest.raises(DataError, match=r"the index belongs to another one"):
        TokenFile(pair)


def test_every_way_to_damage_an_index_gives_one_line(pair: Path) -> None:
    content = bytearray(pair.with_suffix(".idx").read_bytes())
    intact = TokenFile(pair).lengths.tolist()
    for place in range(len(content) - 1):
        pair.with_suffix(".idx").write_bytes(content[:place])
        with pytest.raises(DataError):
            TokenFile(pair)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x40
        pair.with_suffix(".idx").write_bytes(changed)
        try:
            assert sum(TokenFile(pair).lengths) == sum(intact)  # a boundary of documents that is as good as another
        except DataError:
            continue


@pytest.mark.parametrize(("code", "words"), [(6, "dtype number 6"), (99, "dtype number 99")])
def test_tokens_that_are_no_whole_numbers_are_refused(pair: Path, code: int, words: str) -> None:
    content = bytearray(pair.with_suffix(".idx").read_bytes())
    struct.pack_into("<B", content, 17, code)
    pair.with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=words):
        TokenFile(pair)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(pair: Path, missing: str) -> None:
    pair.with_suffix(missing).unlink()
    with pytest.raises(DataError, match=rf"tokens\{missing} cannot be read"):
        TokenFile(pair)
