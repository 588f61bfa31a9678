"""`farspan prepare` on conversations: notes beside the tokens, beside other sources, after a kill, and bad lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.conversations import write_questions

from farspan.data import unfinished
from farspan.data.corpus import Corpus
from farspan.data.errors import DataError
from farspan.data.prepare import prepare
from farspan.data.prepared import Prepared, find_damage
from farspan.data.sources import Source

COUNT = 50


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    write_questions(tmp_path / "questions.jsonl", COUNT, 300)
    return tmp_path / "questions.jsonl"


def prepare_them(directory: Path, *sources: Source, **settings: Any) -> Prepared:
    given: dict[str, Any] = {"heldout_fraction": 0.2, "seed": 4, "report": lambda line: None, **settings}
    return prepare(sources, directory, tokenizer=None, vocabulary_size=384, **given)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("processes", [1, 2])
def test_each_document_says_what_its_answer_is(questions: Path, tmp_path: Path, processes: int) -> None:
    source = Source(str(questions), "questions", chat_template="chatml")
    prepared = prepare_them(tmp_path / "prepared", source, processes=processes)
    tokenizer = prepared.open_tokenizer()
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    opening, closing = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    wanted = {
        f"<|im_start|>user\n{record['context']}{record['question']}{opening}{record['answer']}{closing}": record
        for record in records
    }
    for split in ("train", "heldout"):
        corpus = Corpus(prepared, split)  # type: ignore[arg-type]
        assert corpus.told.all()
        for document, length in enumerate(corpus.lengths.tolist()):
            tokens, answers = corpus.read(document, 0, length), corpus.answers(document)
            record = wanted.pop(tokenizer.decode(tokens))
            assert answers is not None
            ((begin, end),) = answers.spans.tolist()
            assert end == length
            assert tokens[-1] == prepared.eod
            assert tokenizer.decode(tokens[begin:end]) == f"{record['answer']}<|im_end|>\n"
            assert tokenizer.decode(tokens[: answers.context]) == f"<|im_start|>user\n{record['context']}"
    assert not wanted
    assert find_damage(prepared.directory) == []


def test_other_sources_have_no_notes(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number, line in enumerate(questions.read_text().splitlines()):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(json.loads(line)["context"])
    sources = Source(str(tmp_path / "texts")), Source(str(questions), "questions", chat_template="plain")
    prepared = prepare_them(tmp_path / "prepared", *sources)
    corpus = Corpus(prepared, "train")
    here = prepared.sources["questions"]["train"]
    assert np.array_equal(np.flatnonzero(corpus.told), np.arange(here.start, here.stop))
    assert corpus.answers(0) is None
    alone = prepare_them(tmp_path / "alone", sources[0])
    assert not any("answers" in path.name for path in alone.directory.iterdir())
    assert not Corpus(alone, "train").told.any()


def test_a_preparation_that_stopped_goes_on_to_the_same_notes(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", -1.0)
    whole = questions.read_text()
    source = Source(str(questions), "questions", chat_template="plain")
    questions.write_text(whole + '{"prompt": "no response"}\n' + whole.splitlines()[3] + "\n")
    said = r"questions\.jsonl:51 of questions in data.sources is no conversation: it has neither messages, nor"
    with pytest.raises(DataError, match=said):
        prepare_them(tmp_path / "stopped", source)
    lines: list[str] = []
    stopped = prepare_them(tmp_path / "stopped", source, drop_invalid=True, report=lines.append)
    assert any(line.startswith("going on with ") for line in lines)
    assert any("1 no conversation: it has neither messages" in line for line in lines)
    assert contents(stopped.directory) == contents(
        prepare_them(tmp_path / "whole", source, drop_invalid=True).directory
    )
    assert sum(stopped.documents.values()) == COUNT + 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
            ".* refuses a conversation of tool: no tools",
        ),
        (
            "{% if messages[0].role == 'tool' %}\n{{ 1 + messages[0].content }}{% endif %}",
            r".*strict\.jinja .* fails in line 2 .* tool \(TypeError: ",
        ),
    ],
)
def test_a_conversation_that_the_template_does_not_take_is_named(
    questions: Path, tmp_path: Path, text: str, said: str
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(text)
    turns = [{"role": role, "content": "x"} for role in ("tool", "assistant")]
    with questions.open("a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match=rf"^questions\.jsonl:51 of questions: {said}"):
        prepare_them(tmp_path / "prepared", Source(str(questions), "questions", chat_template=str(template)))


def test_another_template_is_another_preparation(questions: Path, tmp_path: Path) -> None:
    prepare_them(tmp_path / "prepared", Source(str(questions), "questions", chat_template="plain"))
    with pytest.raises(DataError, match=r"\(other documents in data.sources\)"):
        prepare_them(tmp_path / "prepared", Source(str(questions), "questions", chat_template="chatml"))


def test_a_template_is_for_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"has a chat_template, but a\.txt is no \.jsonl file of conversations"):
        prepare_them(tmp_path / "prepared", Source(str(tmp_path / "a.txt"), chat_template="plain"))
