"""Conversations to tokens: loss on the answers alone, and where the context of a question ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from farspan.data.answers import Answers
from farspan.data.chat_template import ANSWERING, ChatTemplate
from farspan.data.errors import DataError

# Fields of records of one question: context, question, answer. The first is empty where nothing is read before.
_QUESTIONS = (
    ("context", "question", "answer"),
    ("input_context", "input_query", "output"),  # as RULER's data for Star Attention has them
    (None, "prompt", "response"),
)


class Encoder(Protocol):
    """A tokenizer whose special tokens have names, which text never is."""

    eod: int

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Conversation:
    """roles, contents: of each message, the last of which is an answer. context: characters of the first message that
    are there to be read, with the question behind them; None where the record does not say."""

    roles: tuple[str, ...]
    contents: tuple[str, ...]
    context: int | None = None

    @property
    def text(self) -> str:
        """Its words, one message a line."""
        return "\n".join(self.contents)


def read_conversation(record: Any) -> Conversation:
    """A JSON object: `messages` with `role` and `content`, or `prompt` and `response`, or `context`, `question` and
    `answer`. Messages behind the last answer are left out. DataError says what is wrong with it."""
    if not isinstance(record, dict):
        raise DataError("it is no JSON object")
    if "messages" in record:
        return _messages(record["messages"])
    for fields in _QUESTIONS:
        if all(field in record for field in fields if field):
            context, question, answer = (_text(record, field) if field else "" for field in fields)
            return Conversation(("user", ANSWERING), (context + question, answer), len(context) or None)
    raise DataError("it has neither messages, nor prompt and response, nor context, question and answer")


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, tokenizer: Encoder
) -> tuple[NDArray[np.int32], Answers]:
    """int32 [tokens], which the end-of-document token ends, as part of the last answer; and what carries loss.

    The context is what the conversation says, or else all before the first answer. Only the template's own text can be
    special tokens.
    """
    outline = template.outline(conversation.roles)
    parts: list[NDArray[np.int32]] = []
    spans: list[list[int]] = []
    length = context = 0
    for number, part in enumerate(outline.parts):
        if number == outline.context and conversation.context is None:
            context = length
        if isinstance(part.text, str):
            texts = [_encode_markup(part.text, tokenizer)]
        else:
            cut = conversation.context if part.text == 0 else None
            texts = [tokenizer.encode(text) for text in _cut(conversation.contents[part.text], cut)]
            if cut is not None:
                context = length + len(texts[0])
        begin, length = length, length + sum(map(len, texts))
        parts += texts
        if part.answer:
            if spans and spans[-1][1] == begin:
                spans[-1][1] = length
            else:
                spans.append([begin, length])
    if not spans or spans[-1][1] != length:  # an answer without words
        spans.append([length, length])
    spans[-1][1] = length + 1
    return np.concatenate([*parts, np.array([tokenizer.eod], np.int32)]), Answers(context, np.array(spans, np.int64))


def _messages(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError("its messages are no list of objects")
    roles = tuple(_text(message, "role") for message in messages)
    if ANSWERING not in roles:
        raise DataError(f"none of its messages is of the {ANSWERING}")
    count = len(roles) - roles[::-1].index(ANSWERING)
    return Conversation(roles[:count], tuple(_text(message, "content") for message in messages[:count]))


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"its {field} is no text")
    return value


def _cut(text: str, at: int | None) -> list[str]:
    return [text] if at is None else [text[:at], text[at:]]


def _encode_markup(text: str, tokenizer: Encoder) -> NDArray[np.int32]:
    """Text of a template, in which special tokens are what they are called."""
    special = tokenizer.special_tokens
    if not special:
        return tokenizer.encode(text)
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    pieces = [piece for piece in re.split(f"({names})", text) if piece]
    encoded = [np.array([special[p]], np.int32) if p in special else tokenizer.encode(p) for p in pieces]
    return np.concatenate(encoded)
