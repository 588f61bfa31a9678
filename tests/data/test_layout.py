"""Layouts: every token in one row at most, whole documents where a way of packing promises them, and their measures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.answers import Answers
from farspan.data.best_fit import best_fit, best_fit_layout
from farspan.data.composition import measure, table
from farspan.data.concatenated import ConcatRows
from farspan.data.corpus import Corpus
from farspan.data.documents import Selection
from farspan.data.errors import DataError
from farspan.data.layout import Layout, Overlong, concatenated, padded
from farspan.data.packed import PackedRows

WriteCorpus = Callable[[Sequence[Sequence[int]]], Corpus]
LENGTHS = np.array([7, 45, 1, 130, 64, 33, 1, 200, 90, 64])
OVERLONG: tuple[Overlong, ...] = get_args(Overlong)


def held(layout: Layout) -> Counter[tuple[int, int]]:
    """How often rows hold each (document, token)."""
    pieces = layout.pieces
    return Counter(
        (document, token)
        for document, start, stop in zip(pieces.documents.tolist(), pieces.starts.tolist(), pieces.stops.tolist())
        for token in range(start, stop)
    )


def promised(lengths: Sequence[int], length: int, overlong: Overlong) -> Counter[tuple[int, int]]:
    def kept(size: int) -> int:
        return size if size <= length or overlong == "split" else length if overlong == "truncate" else 0

    return Counter((document, token) for document, size in enumerate(lengths) for token in range(kept(size)))


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    length=st.integers(1, 64),
    overlong=st.sampled_from(OVERLONG),
    seed=st.integers(0, 3),
)
def test_packing_loses_nothing_and_cuts_only_what_is_too_long(
    lengths: list[int], length: int, overlong: Overlong, seed: int
) -> None:
    sizes = np.array(lengths)
    if overlong == "drop" and sizes.min() > length:
        with pytest.raises(DataError, match=r"none of \d+ documents fits .* raise train.sequence_length"):
            padded(sizes, length, overlong)
        return
    for layout in (padded(sizes, length, overlong), best_fit_layout(sizes, length, seed, overlong)):
        assert held(layout) == promised(lengths, length, overlong)
        filled = [int(layout.row(row).sizes.sum()) for row in range(len(layout))]
        assert 0 < min(filled) <= max(filled) <= length
        for document, start, stop in zip(layout.pieces.documents, layout.pieces.starts, layout.pieces.stops):
            assert stop - start == min(lengths[document] - start, length)
            assert start % length == 0
    assert max(np.diff(padded(sizes, length, overlong).offsets)) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=70), st.integers(40, 60))
def test_best_fit_is_that_of_one_piece_after_the_other(sizes: list[int], capacity: int) -> None:
    descending = np.sort(np.array(sizes))[::-1]
    spaces: list[int] = []
    for size in descending.tolist():
        fitting = [row for row, space in enumerate(spaces) if space >= size]
        if not fitting:
            spaces.append(capacity)
            fitting = [len(spaces) - 1]
        fullest = min(fitting, key=lambda row: spaces[row])
        spaces[fullest] -= size
    rows = best_fit(descending, capacity)
    found = capacity - np.bincount(rows, weights=descending)
    assert sorted(found.tolist()) == sorted(spaces)


def test_best_fit_is_near_the_least_number_of_rows() -> None:
    """At most 11/9 of the optimum and 6/9, which is known here: whole rows cut at random places."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        optimum = int(generator.integers(1, 30))
        cuts = [np.unique([0, 997, *generator.integers(1, 997, generator.integers(0, 6))]) for _ in range(optimum)]
        sizes = np.sort(np.concatenate([np.diff(row) for row in cuts]))[::-1]
        assert optimum <= best_fit(sizes, 997).max() + 1 <= 11 / 9 * optimum + 6 / 9


def test_a_million_documents_are_packed_in_seconds() -> None:
    lengths = np.exp(np.random.default_rng(1).normal(6, 1.5, 1_000_000)).astype(np.int64) + 1
    begin = time.process_time()
    layout = best_fit_layout(lengths, 32768, 0, "split")
    assert time.process_time() - begin < 60
    assert layout.pieces.sizes.sum() == lengths.sum()
    assert measure(layout, lengths).padding < 1e-3


def test_which_documents_share_a_row_depends_on_the_seed() -> None:
    lengths = np.full(60, 5)
    one, again, other = (best_fit_layout(lengths, 20, seed, "split").pieces.documents for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("length", [1, 7, 64, 300])
def test_the_layout_of_concat_and_chunk_is_what_its_rows_are(corpus_of: WriteCorpus, length: int) -> None:
    corpus = corpus_of([range(100 * number, 100 * number + size) for number, size in enumerate(LENGTHS[:3])])
    corpus = corpus_of([[number] * size for number, size in enumerate(LENGTHS)])
    rows, laid_out = ConcatRows(corpus, length, 3), PackedRows(corpus, concatenated(corpus.lengths, length, 3))
    assert len(rows) == len(laid_out)
    for number in range(len(rows)):
        for name in ("tokens", "labels", "cu_seqlens", "positions"):
            assert np.array_equal(getattr(rows[number], name), getattr(laid_out[number], name)), name


# Rows of a layout.


class Told:
    """Documents some of which say what their answers are."""

    def __init__(self, corpus: Corpus, told: dict[int, Answers]) -> None:
        self.split, self.lengths, self.read, self._told = corpus.split, corpus.lengths, corpus.read, told
        self.told = np.isin(np.arange(len(corpus.lengths)), list(told))

    def answers(self, document: int) -> Answers | None:
        return self._told.get(document)


def documents(sizes: Sequence[int]) -> list[list[int]]:
    tokens = iter(range(1, sum(sizes) + 1))
    return [[next(tokens) for _ in range(size)] for size in sizes]


def test_rows_hold_their_pieces_and_padding_without_labels(corpus_of: WriteCorpus) -> None:
    """Tokens count up, so a label is its token + 1, also where its document goes on in another row."""
    corpus = corpus_of(documents([30, 5, 9, 41, 3]))
    ends = {30, 35, 44, 85, 88}
    for layout in (padded(corpus.lengths, 16, "split"), best_fit_layout(corpus.lengths, 16, 0, "split")):
        rows = PackedRows(corpus, layout)
        assert rows.length == 16
        seen: Counter[int] = Counter()
        for number in range(len(rows)):
            row = rows[number]
            text = row.tokens > 0
            assert all((row.labels == row.tokens + 1)[text] | np.isin(row.tokens, list(ends))[text])
            assert set(row.tokens[text & (row.labels == -100)].tolist()) <= ends
            assert (row.labels[~text] == -100).all()
            assert row.valid == np.count_nonzero(row.labels != -100)
            assert row.contexts is None
            assert row.cu_seqlens[0] == 0
            assert row.cu_seqlens[-1] == 16
            for start, stop in pairwise(row.cu_seqlens.tolist()):
                assert row.positions[start:stop].tolist() == list(range(stop - start))
                assert len(set(text[start:stop].tolist())) == 1
            seen.update(row.tokens[text].tolist())
        assert seen == Counter(range(1, 89))
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_answers_alone_have_labels_and_contexts_are_told(corpus_of: WriteCorpus) -> None:
    told = {
        0: Answers(4, np.array([[6, 8], [9, 10]])),
        1: Answers(0, np.array([[1, 3]])),
    }
    corpus = Told(corpus_of(documents([10, 3])), told)
    row = PackedRows(corpus, best_fit_layout(corpus.lengths, 16, 0, "drop"))[0]
    assert row.cu_seqlens.tolist() == [0, 10, 13, 16]
    assert row.contexts is not None
    assert row.contexts.tolist() == [4, 0, 3]
    # A label is the token after, so that the token before an answer has its first one.
    wanted = {5: 7, 6: 8, 8: 10, 10: 12, 11: 13}
    assert {place: label for place, label in enumerate(row.labels.tolist()) if label != -100} == wanted
    mixed = PackedRows(
        Told(corpus_of(documents([10, 3])), {0: told[0]}), best_fit_layout(corpus.lengths, 16, 0, "drop")
    )
    assert mixed[0].contexts is None
    short = PackedRows(corpus, padded(corpus.lengths, 7, "truncate"))[0]
    assert short.contexts is not None
    assert short.contexts.tolist() == [4]
    assert short.labels.tolist() == [-100] * 5 + [7, 8]


def test_a_selection_numbers_documents_anew(corpus_of: WriteCorpus) -> None:
    corpus = Told(corpus_of(documents([10, 3, 4])), {2: Answers(1, np.array([[2, 3]]))})
    some = Selection(corpus, np.array([2, 0]))
    assert some.lengths.tolist() == [4, 10]
    assert some.read(0, 1, 3).tolist() == [15, 16]
    assert some.answers(1) is None
    assert some.answers(0) is not None


# Measures.


def test_measures_of_a_layout_that_is_easily_counted() -> None:
    """Documents of 10, 6 and 4 tokens in rows of 8."""
    lengths = np.array([10, 6, 4])
    alone = measure(padded(lengths, 8, "truncate"), lengths)
    assert (alone.rows, alone.tokens) == (3, 18)
    assert alone.padding == pytest.approx(6 / 24)
    assert alone.truncation == pytest.approx(1 / 3)
    assert alone.discarded == pytest.approx(2 / 20)
    assert alone.concatenation == 0
    assert alone.average_length == 6
    assert alone.average_context == pytest.approx((28 + 15 + 6) / 18)

    packed = measure(best_fit_layout(lengths, 8, 0, "split"), lengths)  # 8; 6 and 2; 4
    assert (packed.rows, packed.tokens, packed.discarded) == (3, 20, 0)
    assert packed.padding == pytest.approx(4 / 24)
    assert packed.truncation == pytest.approx(1 / 3)
    assert packed.concatenation == pytest.approx(2 / 4)
    across = measure(best_fit_layout(lengths, 8, 0, "split"), lengths, across_documents=True)
    assert across.average_context == pytest.approx((28 + 28 + 6) / 20)

    stream = measure(concatenated(lengths, 8, 0), lengths)
    assert (stream.rows, stream.padding) == (2, 0)
    assert stream.discarded == pytest.approx(4 / 20)


def test_a_table_has_a_line_for_each() -> None:
    lengths = np.array([10, 6, 4])
    lines = table({"padded": measure(padded(lengths, 8, "drop"), lengths)})
    assert len(lines) == 2
    assert lines[0].split()[:2] == ["rows", "text"]
    assert lines[1].split() == ["padded", "2", "10", "37.50%", "33.33%", "50.00%", "0.00%", "5", "2"]
