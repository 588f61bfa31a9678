"""Small real text for tests that train: some of the standard library's sources, and documents of hardly any tokens."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from farspan.data.indexed import token_dtype, write_index
from farspan.data.prepare import prepare
from farspan.data.tokenizer import Tokenizer
from farspan.data.tokenizer_training import train_on_sources


def prepare_small(directory: Path, vocabulary_size: int = 384) -> Path:
    """Prepared data in `directory / "prepared"`: about forty documents from one token upwards."""
    text, model = directory / "text", directory / "tokenizer.model"
    text.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted((library / "json").glob("*.py")) + sorted((library / "email").glob("*.py"))[:12]:
        (text / source.name).write_bytes(source.read_bytes())
    for number in range(2, 16):
        (text / f"short{number}.txt").write_text("x = 1\n" * (number // 2))
    train_on_sources([str(text)], model, vocabulary_size, seed=0, heldout_fraction=0.2)
    _write_ends(directory / "ends", Tokenizer(model), documents=4)
    prepare(
        [str(text), str(directory / "ends.bin")],
        directory / "prepared",
        tokenizer=model,
        vocabulary_size=vocabulary_size,
        heldout_fraction=0.2,
        seed=0,
        report=lambda line: None,
    )
    return directory / "prepared"


def _write_ends(prefix: Path, tokenizer: Tokenizer, documents: int) -> None:
    """Documents of nothing but their end: no text has so few tokens."""
    dtype = token_dtype(tokenizer.vocabulary_size)
    np.full(documents, tokenizer.eod).astype(dtype).tofile(prefix.with_suffix(".bin"))
    write_index(prefix.with_suffix(".idx"), np.ones(documents, np.int64), dtype)
