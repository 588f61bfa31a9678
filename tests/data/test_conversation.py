"""Conversations: which tokens are answers, where the context ends, and that words are never markup."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from farspan.data.answers import Answers
from farspan.data.chat_template import ChatTemplate
from farspan.data.conversation import encode_conversation, read_conversation
from farspan.data.errors import DataError

MARKS = {"<|im_start|>": 0x110000, "<|im_end|>": 0x110001}


class Letters:
    """A token for each character, and special ones behind all characters."""

    eod = 0
    special_tokens: Mapping[str, int] = MARKS

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.array([ord(letter) for letter in text], np.int32)


class Bare(Letters):
    special_tokens: Mapping[str, int] = {}


def words(tokens: NDArray[np.int32]) -> str:
    names = {number: name for name, number in MARKS.items()} | {0: "<eod>"}
    return "".join(names.get(token) or chr(token) for token in tokens.tolist())


def encoded(record: dict[str, Any], template: str = "chatml", tokenizer: Letters | None = None) -> tuple[Any, Answers]:
    return encode_conversation(read_conversation(record), ChatTemplate(template), tokenizer or Letters())


def answers_in(tokens: NDArray[np.int32], answers: Answers) -> list[str]:
    held = answers.hold(0, len(tokens))
    assert [bool(held[i]) for i in range(len(tokens))] == [
        any(begin <= i < end for begin, end in answers.spans.tolist()) for i in range(len(tokens))
    ]
    return [words(tokens[begin:end]) for begin, end in answers.spans.tolist()]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Bye."},
    {"role": "user", "content": "not answered"},
]


def test_answers_of_all_turns_carry_loss_up_to_their_end_marks() -> None:
    tokens, answers = encoded({"messages": TURNS})
    assert words(tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n<eod>"
    )
    assert answers_in(tokens, answers) == ["Hello!<|im_end|>\n", "Bye.<|im_end|>\n<eod>"]
    assert words(tokens[: answers.context]).endswith("Hi<|im_end|>\n")
    again = Answers.of_notes(answers.notes())
    assert again is not None
    assert again.context == answers.context
    assert np.array_equal(again.spans, answers.spans)
    assert Answers.of_notes(np.empty(0, np.int32)) is None


@pytest.mark.parametrize("names", [("context", "question", "answer"), ("input_context", "input_query", "output")])
def test_a_question_about_a_text_says_where_its_context_ends(names: tuple[str, str, str]) -> None:
    record = dict(zip(names, ("A long text. ", "Who?", " Me.")))
    tokens, answers = encoded(record, "plain")
    assert words(tokens) == "A long text. Who? Me.<eod>"
    assert words(tokens[: answers.context]) == "A long text. "
    assert answers_in(tokens, answers) == [" Me.<eod>"]
    tokens, answers = encoded(record)
    assert words(tokens[: answers.context]) == "<|im_start|>user\nA long text. "
    assert answers_in(tokens, answers) == [" Me.<|im_end|>\n<eod>"]


def test_a_prompt_is_all_context() -> None:
    tokens, answers = encoded({"prompt": "2+2=", "response": "4"}, "plain")
    assert (words(tokens), words(tokens[: answers.context])) == ("2+2=4<eod>", "2+2=")
    tokens, answers = encoded({"prompt": "2+2=", "response": ""}, "plain")
    assert answers_in(tokens, answers) == ["<eod>"]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_nothing_is_context_of_a_conversation_that_an_answer_begins(template: str) -> None:
    tokens, answers = encoded({"messages": [TURNS[2], *TURNS[1:3]]}, template)
    assert answers.context == 0
    assert len(answers_in(tokens, answers)) == 2


def test_words_are_never_markup() -> None:
    """Neither special tokens, nor Jinja, nor what marks the place of a message."""
    evil = "<|im_end|>{{ 7 * 7 }}\ue0001\ue001"
    tokens, answers = encoded({"prompt": evil, "response": evil})
    assert np.count_nonzero(tokens >= 0x110000) == 4
    assert words(tokens).count(evil) == 2
    assert answers_in(tokens, answers) == [f"{evil}<|im_end|>\n<eod>"]


def test_without_special_tokens_markup_is_text() -> None:
    tokens, _ = encoded({"prompt": "a", "response": "b"}, tokenizer=Bare())
    assert words(tokens) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<eod>"


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    text = "{{ bos_token }}{% for m in messages %}[{{ m['role'] | upper }}] {{ m.content | trim }} {% endfor %}"
    (tmp_path / "chat.jinja").write_text(text.replace("{{ bos_token }}", "^"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": text, "bos_token": {"content": "^"}, "eos_token": "$"})
    )
    for name in ("chat.jinja", "tokenizer_config.json"):
        tokens, answers = encoded({"prompt": "a", "response": "b"}, str(tmp_path / name))
        assert words(tokens) == "^[USER] a [ASSISTANT] b <eod>"
        assert answers_in(tokens, answers) == ["[ASSISTANT] b <eod>"]  # it opens no answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% if %}", "is no Jinja template"),
        ("{{ messages | length }}", "changes earlier text when a message follows"),
        ("{{ raise_exception('no systems here') }}", "refuses a conversation of user: no systems here"),
        (
            "{{ messages[0].role }}\n{{ 'turn ' + messages | length }}",
            r"chat\.jinja of data.sources fails in line 2 on a conversation of user \(TypeError: .*\): mend the",
        ),
        ("{{ '%(name)s' | format(role='a') }}", r"fails in line 1 on a conversation of user \(KeyError: 'name'\)"),
    ],
)
def test_templates_that_do_not_do_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "chat.jinja").write_text(text)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    with pytest.raises(DataError, match=reason):
        encoded({"messages": turns}, str(tmp_path / "chat.jinja"))


@pytest.mark.parametrize("token", [{"id": 3}, 3])
def test_a_special_token_without_text_is_named(tmp_path: Path, token: Any) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": "{{ eos_token }}", "eos_token": token}))
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json of data.sources has an entry eos_token that is no text and"
    ):
        ChatTemplate(str(path))


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(DataError, match="'chatm', which is none of chatml, plain and no readable file"):
        ChatTemplate("chatm")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "no JSON object"),
        ('{"text": "a"}', "neither messages, nor prompt and response"),
        ('{"messages": "a"}', "no list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "none of its messages is of the assistant"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "its content is no text"),
        ('{"prompt": "a", "response": 4}', "its response is no text"),
    ],
)
def test_records_that_are_no_conversation_say_why(line: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_conversation(json.loads(line))
