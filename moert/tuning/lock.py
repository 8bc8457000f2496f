"""A lock between processes that dies with its holder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("moert")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file exclusively, waiting for whoever else does.

    The file stays: removing it would let a third process lock another file of the same name.

    Raises:
        OSError: the file cannot be made or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        # no such locks outside POSIX: files are still replaced whole, only a merge may be lost
        yield
        return
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
