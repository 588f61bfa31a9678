"""Small real text for tests that train: some of the standard library's sources, and documents of hardly any tokens."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from farspan.data.prepare import prepare


def prepare_small(directory: Path, vocabulary_size: int = 384) -> Path:
    """Prepared data in `directory / "prepared"`: about forty documents from one token upwards."""
    text = directory / "text"
    text.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted((library / "json").glob("*.py")) + sorted((library / "email").glob("*.py"))[:12]:
        (text / source.name).write_bytes(source.read_bytes())
    for number in range(16):
        (text / f"short{number}.txt").write_text("x = 1\n" * (number // 2))
    prepare(
        [str(text)],
        directory / "prepared",
        tokenizer=None,
        vocabulary_size=vocabulary_size,
        heldout_fraction=0.2,
        seed=0,
        report=lambda line: None,
    )
    return directory / "prepared"
