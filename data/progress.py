"""How far something is: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Callable
from typing import TextIO

_BAR = 30  # characters
_BAR_SECONDS = 0.2
_LINE_SECONDS = 10.0


class Progress:
    """How many of `total` bytes are done, at what rate, and how long the rest will take.

    action: what is being done, such as "encoding". `done` bytes were done before, and count for no rate.
    report: gets a line every ten seconds, unless there is a `terminal` to draw a bar on.
    """

    def __init__(
        self, action: str, total: int, report: Callable[[str], None], terminal: TextIO | None = None, done: int = 0
    ) -> None:
        self._action, self._total, self._report, self._terminal = action, total, report, terminal
        self._done = self._before = done
        self._tokens = 0
        self._started = self._last = time.monotonic()

    def add(self, size: int) -> None:
        """So many bytes more."""
        self.reach(self._done + size)

    def reach(self, done: int, tokens: int = 0) -> None:
        """So many bytes in all, and so many tokens more."""
        self._done, self._tokens = done, self._tokens + tokens
        now = time.monotonic()
        if now - self._last >= (_LINE_SECONDS if self._terminal is None else _BAR_SECONDS):
            self._last = now
            self._say(self._line(now - self._started))

    def end(self) -> None:
        """Leaves a bar behind that says all, if one was drawn."""
        if self._terminal is not None and self._last > self._started:
            self._say(self._line(max(time.monotonic() - self._started, 1e-9)))
            self._terminal.write("\n")

    def _say(self, line: str) -> None:
        if self._terminal is None:
            self._report(line)
            return
        full = round(_BAR * min(1.0, self._done / max(self._total, 1)))
        self._terminal.write(f"\r[{'#' * full}{'.' * (_BAR - full)}] {line}\x1b[K")
        self._terminal.flush()

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._before) / seconds
        left = round((self._total - self._done) / rate) if rate > 0 else 0
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        tokens = f", {self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
        return (
            f"{self._action} {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB "
            f"({self._done / max(self._total, 1):.0%}), {rate / 1e6:,.1f} MB/s{tokens}, {clock} left"
        )
