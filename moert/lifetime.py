"""How a runtime ends: closed, forked away from, never copied; and who may use it until then."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch

from moert.build import Built
from moert.errors import StateError
from moert.streams import refuse_inside_capture

if TYPE_CHECKING:
    from typing_extensions import Self

_LIVE: weakref.WeakSet[Lifetime] = weakref.WeakSet()


class Lifetime:
    """What stands between a runtime and its built layer. One that was never built refuses every use."""

    device: torch.device

    def __init__(self) -> None:
        self._refusal: str | None = "the runtime was not built"

    def _begin(self, built: Built) -> None:
        """The layer is ready: from now on the runtime may be used."""
        self._built = built
        self._lock = built.group.lock
        self.device = built.group.device
        self._refusal = None
        _LIVE.add(self)

    def close(self) -> None:
        """Free graphs at once, and with the last runtime of the share group the arena; idempotent.

        Raises:
            StateError: the current stream is capturing; nothing was freed.
        """
        if self._refusal is not None:
            return
        with self._lock:
            if self._refusal is None:  # not closed by another thread meanwhile
                refuse_inside_capture(self.device, "close")
                self._refusal = "the runtime is closed"
                _LIVE.discard(self)
                self._built.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _open(self, what: str) -> Iterator[Built]:
        """The built layer, which nobody closes meanwhile."""
        self._usable(what)  # first: in a forked child the lock may never be free
        with self._lock:
            self._usable(what)
            yield self._built

    def _usable(self, what: str) -> None:
        if self._refusal is not None:
            raise StateError(f"{what}: {self._refusal}; make a new MoERuntime")

    def _refuse_copy(self, *_: object) -> NoReturn:
        raise StateError(
            "a MoERuntime holds device memory and captured graphs and cannot be pickled or copied; make a "
            "new one from the config and weights, with share= for the same arena"
        )

    __reduce_ex__ = __deepcopy__ = __copy__ = _refuse_copy


def _refuse_after_fork() -> None:
    for runtime in list(_LIVE):
        runtime._refusal = (
            "the process was forked after it was made: GPU state does not survive that"
        )


os.register_at_fork(after_in_child=_refuse_after_fork)
