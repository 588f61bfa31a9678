"""Chat templates: how the messages of a conversation become one text, in Jinja, as tokenizers of chat models say it."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from farspan.data.errors import DataError

ANSWERING = "assistant"  # the role whose messages are answers
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
_PLACE = re.compile("\ue000(\\d+)\ue001")  # stands for the content of a message, of private-use characters


@dataclass(frozen=True)
class Part:
    """Text of the template, or the number of the message whose content stands here; `answer`: it carries loss."""

    text: str | int
    answer: bool


@dataclass(frozen=True)
class Outline:
    """A conversation without its words. `context` parts come before the first answer's own opening."""

    parts: tuple[Part, ...]
    context: int


class ChatTemplate:
    """One of `BUILT_IN`, or a file: Jinja, or a `tokenizer_config.json` that has a `chat_template`.

    Templates are rendered without the words of the messages, so what these hold is never taken for markup; a template
    cannot make its text depend on them. Raises DataError when there is no template of this name, or it is none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.text, self._pieces = _read(name)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(self.text)
        except TemplateError as error:
            raise DataError(f"chat_template {name} of data.sources is no Jinja template: {error}.") from error
        self.outline = lru_cache(maxsize=1024)(self._outline)

    def _outline(self, roles: tuple[str, ...]) -> Outline:
        """Of a conversation with these roles; its last answer is its end. DataError where the template refuses them."""
        parts: list[Part] = []
        context: int | None = None
        done = ""
        for number, role in enumerate(roles):
            if role != ANSWERING:
                continue
            before, opened = self._render(roles[:number], False), self._render(roles[:number], True)
            closed = self._render(roles[: number + 1], False)
            if not (opened.startswith(done) and closed.startswith(opened)):
                raise DataError(
                    f"chat_template {self.name} of data.sources changes earlier text when a message follows, so that "
                    "it is not clear where answers begin: set it to chatml, or to a template that only goes on."
                )
            if context is None and opened.startswith(before):
                parts += _parts(before, False)
                context, done = len(parts), before
            parts += _parts(opened[len(done) :], False)
            context = len(parts) if context is None else context
            parts += _parts(closed[len(opened) :], True)
            done = closed
        assert context is not None  # a conversation has an answer
        return Outline(tuple(parts), context)

    def _render(self, roles: Sequence[str], opening: bool) -> str:
        messages = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
        try:
            return self._template.render(messages=messages, add_generation_prompt=opening, **self._pieces)
        except TemplateError as error:
            raise DataError(
                f"chat_template {self.name} of data.sources refuses a conversation of {', '.join(roles)}: {error}."
            ) from error
        except Exception as error:  # what the template's own expressions raise
            line = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
            ]
            raise DataError(
                f"chat_template {self.name} of data.sources fails in line {line[-1] if line else 1} on a conversation "
                f"of {', '.join(roles)} ({type(error).__name__}: {error}): mend the template, or set it to chatml."
            ) from error

    @staticmethod
    def _refuse(message: str) -> None:
        raise TemplateError(message)


def _parts(text: str, answer: bool) -> list[Part]:
    """Template text and the numbers of messages in turn."""
    pieces = [int(piece) if place % 2 else piece for place, piece in enumerate(_PLACE.split(text))]
    return [Part(piece, answer) for piece in pieces if piece != ""]


def _read(name: str) -> tuple[str, dict[str, str]]:
    """The template's text, and the special pieces that it may name."""
    if name in BUILT_IN:
        return BUILT_IN[name], {}
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat_template of data.sources is {name!r}, which is none of {', '.join(BUILT_IN)} and no readable file."
        ) from error
    if path.suffix != ".json":
        return text, {}
    try:
        settings = json.loads(text)
        template = settings["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"chat_template {name} of data.sources has no chat_template inside.") from error
    if not isinstance(template, str):
        raise DataError(f"chat_template {name} of data.sources holds several templates: save one as a .jinja file.")
    pieces = {key: settings[key] for key in ("bos_token", "eos_token") if settings.get(key)}
    return template, {key: _special(name, key, piece) for key, piece in pieces.items()}


def _special(name: str, key: str, piece: Any) -> str:
    """The text of a special token, which is written as such or as an object."""
    text = piece.get("content") if isinstance(piece, dict) else piece
    if not isinstance(text, str):
        raise DataError(
            f"chat_template {name} of data.sources has an entry {key} that is no text and has no content that is."
        )
    return text
