"""Dataset decomposition: the vectors of the published code, its properties, and whole corpora against one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from farspan.data.corpus import Corpus
from farspan.data.decompose import BucketRows, DocumentDraws, decompose, decompose_document

VECTORS = [
    (257, [8], [8]),
    (256, [], []),
    (1, [], []),
    (0, [], []),
    (8193, [13], [13]),
    (10000, [13, 10, 9, 8], [13, 10, 9, 8]),
    (16385, [13, 13], [13, 12, 11, 10, 9, 8]),
]


@pytest.mark.parametrize(("length", "ours", "published"), VECTORS)
def test_vectors(length: int, ours: list[int], published: list[int]) -> None:
    assert [log2 for _, log2 in decompose_document(length, randomize=False)] == ours
    assert [log2 for _, log2 in decompose_document(length, randomize=False, overlap=0)] == published


def test_what_the_published_rule_discards() -> None:
    def discarded(length: int) -> int:
        start, log2 = decompose_document(length, randomize=False, overlap=0)[-1]
        return length - start - (1 << log2) - 1

    assert [discarded(length) for length in (10000, 16385)] == [12, 251]


@pytest.mark.parametrize("randomize", [False, True])
@pytest.mark.parametrize("overlap", [0, 1])
def test_rows_follow_each_other_and_the_rest_is_shorter_than_the_smallest(randomize: bool, overlap: int) -> None:
    for length in (*range(0, 1200, 7), 16383, 16384, 16385, 40000, 123457):
        end = 0
        for start, log2 in decompose_document(length, 5, 10, randomize, DocumentDraws(3, length), overlap):
            assert 5 <= log2 <= 10
            assert start == end
            assert start + (1 << log2) + 1 <= length
            end = start + (1 << log2) + 1 - overlap
        assert length - end <= (32 if end == 0 or overlap == 0 else 33)


def test_up_to_two_of_the_largest_rows_nothing_is_drawn() -> None:
    assert decompose_document(2**14, 8, 13, rng=None) == decompose_document(2**14, 8, 13, randomize=False)


def test_an_overlap_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or 1 tokens, not by 2"):
        decompose_document(1000, overlap=2)


def test_buckets_get_equal_tokens_of_long_documents() -> None:
    """Chi-square of the draws of many documents against probabilities in proportion to 2^-k."""
    rows = [log2 for d in range(20) for _, log2 in decompose_document(10**6, 8, 13, rng=DocumentDraws(1, d))]
    counts = np.bincount(rows, minlength=14)[8:]
    expected = len(rows) * 2.0 ** -np.arange(6) / (2.0 ** -np.arange(6)).sum()
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # five degrees of freedom: one time in a thousand
    tokens = counts * 2.0 ** np.arange(8, 14)
    assert np.abs(tokens / tokens.mean() - 1).max() < 0.15


@pytest.mark.parametrize("randomize", [False, True])
def test_a_corpus_is_its_documents(randomize: bool) -> None:
    lengths = np.array([0, 1, 64, 65, 66, 500, 2048, 2049, 2050, 60_000, 100, 4097, 250_001])
    found = decompose(lengths, 64, 1024, randomize, seed=9)
    assert list(found.places) == [1024, 512, 256, 128, 64]
    rows = {
        (document, start, length)
        for length, places in found.places.items()
        for document, start in zip(places.documents.tolist(), places.starts.tolist())
    }
    assert len(rows) == sum(len(places) for places in found.places.values())
    expected, covered = set(), 0
    for document, length in enumerate(lengths.tolist()):
        alone = decompose_document(length, 6, 10, randomize, DocumentDraws(9, document))
        expected |= {(document, start, 1 << log2) for start, log2 in alone}
        covered += sum(1 << log2 for _, log2 in alone) + bool(alone)
    assert rows == expected
    assert found.discarded_tokens == lengths.sum() - covered
    assert found.discarded_documents == 3


def test_draws_of_a_document_do_not_depend_on_others() -> None:
    lengths = np.array([10, 50_000, 300, 70_000])
    others = np.array([9999, 50_000, 80_000, 70_000])
    one, two = (decompose(numbers, 64, 1024, True, seed=2).places for numbers in (lengths, others))
    for length in one:
        for document in (1, 3):
            starts = [set(p[length].starts[p[length].documents == document].tolist()) for p in (one, two)]
            assert starts[0] == starts[1]
    assert any(len(one[k]) != len(decompose(lengths, 64, 1024, True, seed=3).places[k]) for k in one)


@pytest.mark.parametrize("randomize", [False, True])
def test_some_documents_have_the_rows_that_they_have_among_all(randomize: bool) -> None:
    lengths = np.array([0, 1, 64, 65, 66, 500, 2048, 2049, 2050, 60_000, 100, 4097, 250_001])
    found = decompose(lengths, 64, 1024, randomize, seed=9)
    chosen = np.array([1, 3, 9, 10])
    some, others = found.of(chosen, lengths), found.of(np.setdiff1d(np.arange(len(lengths)), chosen), lengths)
    for length, places in some.places.items():
        assert set(places.documents.tolist()) <= set(chosen.tolist())
        assert len(places) + len(others.places[length]) == len(found.places[length])
    assert some.discarded_tokens + others.discarded_tokens == found.discarded_tokens
    assert (some.discarded_documents, others.discarded_documents) == (1, 2)


def test_a_million_documents() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(6.0, 1.5, 1_000_000)).astype(np.int64)
    lengths[:3] = 50_000_000, 3_000_000, 100_000
    found = decompose(lengths, 256, 8192, True, seed=0)
    covered = sum(length * len(places) for length, places in found.places.items())
    assert lengths.sum() - covered - 1_000_000 < found.discarded_tokens < lengths.sum() - covered


def test_rows_are_read_from_their_documents(corpus_of: Callable[[Sequence[Sequence[int]]], Corpus]) -> None:
    documents = [list(range(100, 140)), [7], list(range(500, 513))]
    corpus = corpus_of(documents)
    found = decompose(corpus.lengths, 4, 16, False, seed=0)
    seen = []
    for length, places in found.places.items():
        rows = BucketRows(corpus, places, length)
        assert len(rows) == len(places)
        for i in range(len(rows)):
            row = rows[i]
            assert np.array_equal(row.labels, row.tokens + 1)  # tokens count up here
            assert row.cu_seqlens.tolist() == [0, length]
            assert row.positions.tolist() == list(range(length))
            assert row.valid == length == rows.length
            seen += row.tokens.tolist()
        with pytest.raises(IndexError, match=f"Row {len(rows)} of {len(rows)}"):
            rows[len(rows)]
    # 40 tokens are 16 + 16 + 4 and a last label; of 13 tokens 12 are labels.
    assert sorted(seen) == [*range(100, 136), *range(500, 512)]
    assert (found.discarded_tokens, found.discarded_documents) == (3 + 1 + 0, 1)
