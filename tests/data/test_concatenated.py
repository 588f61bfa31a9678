from collections.abc import Callable, Sequence

import numpy as np
import pytest

from farspan.data.concatenated import ConcatRows
from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.prepare import Prepared

WriteCorpus = Callable[[Sequence[Sequence[int]]], Corpus]


def _documents(lengths: Sequence[int]) -> list[list[int]]:
    """Tokens that are all different, so that a misplaced one is seen."""
    tokens = iter(range(sum(lengths)))
    return [[next(tokens) for _ in range(length)] for length in lengths]


def _stream_order(rows: ConcatRows, documents: Sequence[Sequence[int]]) -> list[int]:
    """The order of the documents, read off their first tokens in the rows."""
    stream = [token for row in range(len(rows)) for token in rows[row].tokens.tolist()]
    owner = {token: number for number, document in enumerate(documents) for token in document}
    return list(dict.fromkeys(owner[token] for token in stream))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 64, 100])
@pytest.mark.parametrize(
    "lengths",
    [[100], [1] * 100, [1, 1, 50, 1, 47], [7, 13, 1, 29, 3, 1, 1, 17, 28], [16, 64, 20], [99, 1]],
    ids=["one", "ones", "ones and long", "odd", "fitting", "one at the end"],
)
def test_rows_are_the_stream_cut_in_pieces(corpus_of: WriteCorpus, lengths: list[int], length: int) -> None:
    documents = _documents(lengths)
    rows = ConcatRows(corpus_of(documents), length, seed=4)
    assert len(rows) == 100 // length

    # The whole stream, written down: token, label, and place within the document.
    order = _stream_order(rows, documents)
    order += [number for number in range(len(documents)) if number not in order]  # the dropped rest
    stream = [token for number in order for token in documents[number]]
    labels = [label for number in order for label in [*documents[number][1:], -100]]
    places = [place for number in order for place in range(len(documents[number]))]
    for number in range(len(rows)):
        row, cut = rows[number], slice(number * length, (number + 1) * length)
        assert row.tokens.tolist() == stream[cut]
        assert row.labels.tolist() == labels[cut]
        assert row.valid == sum(label != -100 for label in labels[cut])
        starts = [0, *(i for i in range(1, length) if places[cut][i] == 0), length]
        assert row.cu_seqlens.tolist() == starts
        expected = [i - max(start for start in starts if start <= i) for i in range(length)]
        assert row.positions.tolist() == expected
        for array in (row.tokens, row.labels, row.cu_seqlens, row.positions):
            assert array.dtype == np.int64


def test_a_document_goes_on_in_the_next_row_with_its_true_label(corpus_of: WriteCorpus) -> None:
    rows = ConcatRows(corpus_of([[10, 11, 12, 13, 14]]), 2, seed=0)
    assert rows[0].labels.tolist() == [11, 12]
    assert rows[1].labels.tolist() == [13, 14]
    assert rows[1].positions.tolist() == [0, 1]
    assert len(rows) == 2


def test_the_order_of_documents_depends_on_the_seed_only(corpus_of: WriteCorpus) -> None:
    documents = _documents([5] * 30)
    corpus = corpus_of(documents)
    orders = [_stream_order(ConcatRows(corpus, 10, seed), documents) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_outside_are_refused(corpus_of: WriteCorpus, row: int) -> None:
    with pytest.raises(IndexError):
        ConcatRows(corpus_of([[1, 2, 3, 4, 5]]), 2, seed=0)[row]


def test_too_little_text_for_one_row_is_refused(corpus_of: WriteCorpus) -> None:
    corpus = corpus_of([[1, 2], [3]])
    assert len(ConcatRows(corpus, 3, seed=0)) == 1
    with pytest.raises(DataError, match=r"train\.sequence_length is 4, but the train split has only 3 tokens"):
        ConcatRows(corpus, 4, seed=0)


def test_rows_of_prepared_text_end_documents_with_eod(prepared: Prepared) -> None:
    rows = ConcatRows(Corpus(prepared, "train"), 512, seed=0)
    row = rows[len(rows) // 2]
    assert np.array_equal(row.labels == -100, row.tokens == prepared.eod)
    inner = row.cu_seqlens[1:-1]
    assert (row.tokens[inner - 1] == prepared.eod).all()
