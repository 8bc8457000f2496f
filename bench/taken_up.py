"""Reports that grow cell by cell over several runs, and the time that a run may take."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def taken_up(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The report at `path` if all that `fresh` says is the same there, else `fresh`.

    Args:
        fresh: what a report starts with; what is empty in it is what runs fill in.
    """
    if not path.exists():
        return fresh
    old: dict[str, Any] = json.loads(path.read_text())
    same = all(old.get(key) == value for key, value in fresh.items() if value)
    return {**fresh, **old} if same else fresh


def save(path: Path, report: dict[str, Any]) -> None:
    """Replace the file at once: whoever is stopped meanwhile leaves the old one or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(fresh, path)


class Budget:
    """Time that a run may take: what is begun is finished, what would not be done in time is not begun.

    Args:
        seconds: from now on; None for no end.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._begin = seconds, time.perf_counter()
        self._longest: dict[str, float] = {}

    def allows(self, what: str, kind: str = "") -> bool:
        """Whether there is time for one more that takes as long as the longest of its kind; says if not."""
        used = time.perf_counter() - self._begin
        if self._seconds is None or used + self._longest.get(kind, 0.0) <= self._seconds:
            return True
        print(f"{what} is left for another run: {used:.0f} s are used", flush=True)
        return False

    @contextmanager
    def on_one(self, kind: str = "") -> Iterator[None]:
        """Around one of a kind."""
        begin = time.perf_counter()
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.perf_counter() - begin)
