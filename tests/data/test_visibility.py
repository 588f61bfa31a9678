"""Who sees whom in packed rows under Star Attention, from its definition; and which rows roam."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from farspan.data.batch import make_batch
from farspan.data.errors import DataError
from farspan.data.rows import Row
from farspan.data.visibility import BY_DOCUMENT, Star, Visibility, Window
from farspan.parallel import orders

LENGTH, BLOCK, ANCHOR = 57, 6, 4
# Documents of one token, of less than two blocks, of two blocks, of many; none is a multiple of the block.
SIZES = ([1, 11, 12, 33], [40, 17])
CONTEXTS = ([1, 3, 7, 40], [0, 13])  # given by the data; one is more than its document


def row(number: int) -> Row:
    bounds = np.cumsum([0, *SIZES[number]])
    positions = np.concatenate([np.arange(size) for size in SIZES[number]])
    contexts = np.array(CONTEXTS[number])
    return Row(np.arange(LENGTH), np.arange(1, LENGTH + 1), bounds, positions, LENGTH, contexts)


ROWS = [row(0), row(1)]


def documents(number: int, mode: str) -> list[tuple[int, int, int]]:
    """(begin, size, context) of each document; context 0 where it is dense."""
    begin, found = 0, []
    for size, given in zip(SIZES[number], CONTEXTS[number]):
        context = min(given, size) if mode == "sft" else size - max(1, round(0.25 * size))
        found.append((begin, size, context if size >= 2 * BLOCK else 0))
        begin += size
    return found


def star(mode: str) -> Star:
    return Star(BLOCK, ANCHOR, 0.25 if mode == "lm" else None)


@pytest.mark.parametrize("mode", ["lm", "sft"])
def test_the_mask_is_that_of_the_definition(mode: str) -> None:
    seen = Visibility(star=star(mode))
    mask = make_batch(ROWS, orders.zigzag(LENGTH, 2), 0, visibilities=[seen]).masks[seen]
    visible = mask.visible(slice(0, LENGTH), slice(0, LENGTH))
    for number in (0, 1):
        expected = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for begin, size, context in documents(number, mode):
            for q in range(size):
                for k in range(q + 1):
                    sees = q >= context or q // BLOCK == k // BLOCK or k < min(ANCHOR, context)
                    expected[begin + q, begin + k] = sees
        assert torch.equal(visible[number], expected)


def test_windows_and_their_sinks_go_by_document() -> None:
    seen = Visibility(window=Window(5, 2))
    assert seen.in_words == "the last 5 tokens and the first 2"
    visible = seen.mask(ROWS).visible(slice(0, LENGTH), slice(0, LENGTH))
    for number in (0, 1):
        expected = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for begin, size, _ in documents(number, "lm"):
            for q in range(size):
                for k in range(q + 1):
                    expected[begin + q, begin + k] = q - k < 5 or k < 2
        assert torch.equal(visible[number], expected)
    with pytest.raises(ValueError, match="blocks or a window, not both"):
        Visibility(star=star("lm"), window=Window(5))


@pytest.mark.parametrize("mode", ["lm", "sft"])
def test_rows_that_are_global_roam_but_not_dense_documents(mode: str) -> None:
    for numbers in ([0], [1], [0, 1]):
        expected = np.zeros(LENGTH, bool)
        for number in numbers:
            for begin, size, context in documents(number, mode):
                if size >= 2 * BLOCK:
                    expected[begin + context : begin + size] = True
        roaming = Visibility(star=star(mode)).roaming([ROWS[number] for number in numbers])
        assert np.array_equal(roaming, expected)


def test_across_documents_a_row_is_one_document() -> None:
    seen = Visibility(across_documents=True, star=star("lm"))
    context = LENGTH - round(LENGTH / 4)
    assert seen.roaming(ROWS).tolist() == [x >= context for x in range(LENGTH)]
    mask = seen.mask(ROWS)
    assert mask.batch == 1
    visible = mask.visible(slice(0, LENGTH), slice(0, LENGTH))[0]
    assert visible[context].sum() == context + 1
    assert visible[context - 1].sum() == ANCHOR + (context - 1) % BLOCK + 1


def test_labels_are_those_of_the_row() -> None:
    """Which tokens carry loss is the data's to say: here the answer, the end of the second row's last document."""
    answer = np.arange(LENGTH) >= 52
    asked = replace(ROWS[1], labels=np.where(answer, ROWS[1].labels, -100), valid=5)
    parts = [
        make_batch([asked], orders.zigzag(LENGTH, 3), rank, visibilities=[Visibility(star=star("sft"))])
        for rank in (0, 1, 2)
    ]
    assert sum(part.valid for part in parts) == 5


def test_text_alone_does_not_say_where_a_context_ends() -> None:
    with pytest.raises(DataError, match=r"attention.star.mode sft takes the end of each document's context from"):
        Visibility(star=star("sft")).mask([replace(ROWS[0], contexts=None)])


def test_rows_of_the_same_documents_share_a_mask() -> None:
    """As many as there are in a batch of short rows; one that differs is enough for a mask of each."""
    whole, parts = (
        Row(np.zeros(8, np.int64), np.zeros(8, np.int64), np.array(bounds), np.arange(8), 8)
        for bounds in ([0, 8], [0, 3, 8])
    )
    assert BY_DOCUMENT.mask([whole] * 5).bounds[0].shape == (1, 8)
    mixed = BY_DOCUMENT.mask([whole, whole, parts])
    assert mixed.bounds[0].shape == (3, 8)
    assert torch.equal(mixed.visible(slice(0, 8), slice(0, 8))[0], torch.ones(8, 8, dtype=torch.bool).tril())
