"""Where a long text may be cut without a change of its tokens."""

import re
from collections.abc import Iterator

# Before a single space between two words: byte-pair pieces, SentencePiece's and byte-level ones, begin there or end.
_CUT = re.compile(r"(?<=\S) (?=\S)")
_CUT_BYTES = re.compile(_CUT.pattern.encode())
_SEGMENT = 1 << 16  # characters encoded at once: tokenizers need a few hundred bytes of memory for each


def segments(text: str) -> Iterator[str]:
    """A text in parts of a size that is good to encode; longer ones where nothing can be cut."""
    start = 0
    while start < len(text):
        boundary = _CUT.search(text, start + _SEGMENT)
        stop = boundary.start() if boundary else len(text)
        yield text[start:stop]
        start = stop


def last_cut(content: bytes, searched: int = 0) -> int:
    """The last place of UTF-8 text that can be cut, in bytes; 0 where there is none. Only its end is looked at, and
    nothing of its first `searched` bytes, in which there is none."""
    for window in (1 << 10, 1 << 16, len(content)):
        first = max(searched - 1, len(content) - window, 0)  # a space that ended what was searched may be one now
        places = [found.start() for found in _CUT_BYTES.finditer(content, first)]
        if places:
            return places[-1]
    return 0
