from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from farspan.data.corpus import Corpus
from farspan.data.prepare import Prepared, prepare
from farspan.data.text import read_document, standard_library


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 real texts, an empty one and one in a folder below: enough to train a small tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "below").mkdir()
    (folder / "below" / "odd.txt").write_bytes("\tspaces  \u2581 \r\n<eod> 😀\n".encode())
    (folder / "empty.py").write_bytes(b"")
    for number, document in enumerate(standard_library()[:60]):
        (folder / f"{number:02d}.py").write_bytes(read_document(document.path).encode())
    return folder


@pytest.fixture(scope="session")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    directory = tmp_path_factory.mktemp("prepared") / "tokens"
    return prepare(
        [str(texts)],
        directory,
        tokenizer=None,
        vocabulary_size=800,
        heldout_fraction=0.2,
        seed=3,
        report=lambda line: None,
    )


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[[Sequence[Sequence[int]]], Corpus]:
    """Writes documents given as token ids, and opens them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(documents: Sequence[Sequence[int]]) -> Corpus:
        builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(str(tmp_path / "train.idx"))
        return Corpus(Prepared(tmp_path, tmp_path / "tokenizer.model", "", 1000, 1, {}, {}, ""), "train")

    return write
