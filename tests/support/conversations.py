"""Questions about real text: small ones to train on."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from farspan.data.prepare import prepare
from farspan.data.sources import Source


def write_questions(path: Path, count: int, characters: int) -> None:
    """Lines of JSON with a context of up to `characters`, a question, and as answer a line of the context."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(source.read_text() for source in sorted((library / "json").glob("*.py")))
    records = []
    for number in range(count):
        size = characters // 4 + (characters * 3 // 4) * number // count
        context = text[number * 200 : number * 200 + size]
        records.append({"context": context, "question": f"\nLine {number % 5}?\n", "answer": context.splitlines()[-1]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepare_questions(directory: Path, template: str, count: int = 60, characters: int = 400) -> Path:
    """Prepared data in `directory / "prepared"`, of one source with the name `questions`."""
    write_questions(directory / "questions.jsonl", count, characters)
    prepare(
        [Source(str(directory / "questions.jsonl"), "questions", chat_template=template)],
        directory / "prepared",
        tokenizer=None,
        vocabulary_size=384,
        heldout_fraction=0.2,
        seed=0,
        report=lambda line: None,
    )
    return directory / "prepared"
