"""Hands times that were measured elsewhere to pytest-benchmark, by its public interface alone.

Its own timer would measure what it costs the host to launch something. Here the times come first, from
events on the device; a timer then plays them back around rounds that do nothing. So its statistics,
tables, JSON and comparisons are those of the device's times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class Playback:
    """A timer: called twice a round, it says 0 and then how long that round took."""

    def __init__(self) -> None:
        self._left: Iterator[float] = iter(())
        self._running = False

    def load(self, seconds: Sequence[float]) -> None:
        self._left, self._running = iter(seconds), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else next(self._left)


PLAYBACK = Playback()


def play(benchmark: Any, microseconds: Sequence[float]) -> None:
    """Give a benchmark fixture its samples, one a round.

    Args:
        benchmark: the fixture, of a test whose marker names `PLAYBACK` as the timer.
        microseconds: times of one run.

    Raises:
        ValueError: a time that is not positive: nothing was measured.
    """
    if not microseconds or min(microseconds) <= 0:
        raise ValueError(f"samples {list(microseconds)}: need positive times")
    PLAYBACK.load([us * 1e-6 for us in microseconds])
    benchmark.pedantic(lambda: None, rounds=len(microseconds))
