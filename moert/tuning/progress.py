"""One line on a terminal during long work: how far, and how long it will still take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """Rewrites one line of a terminal; silent where the stream is none.

    Args:
        what: is worked on.
        steps: in all.
        stream: standard error by default.
        now: seconds of a clock.
        verb: what is done to it.
    """

    def __init__(
        self,
        what: str,
        steps: int,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        verb: str = "tuning",
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shown = bool(self._stream and self._stream.isatty())
        self._what, self._steps = f"{verb} {what}", max(steps, 1)
        self._now, self._start = now, now()
        self._width = 0

    def update(self, done: float, doing: str) -> None:
        """`done` of the steps lie behind, fractions count."""
        if not self._shown:
            return
        part = min(done / self._steps, 1.0)
        left = ""
        if part > 0:
            seconds = round((self._now() - self._start) * (1.0 - part) / part)
            left = f", {seconds // 60}:{seconds % 60:02} left"
        self._line(f"moert: {self._what}, {doing}: {part:.0%}{left}")

    def close(self) -> None:
        """Wipe the line."""
        if self._width:
            self._line("")
            self._stream.write("\r")
            self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)
