"""Keeps the work of one share group in one order, whichever streams the callers use.

All layers of a group share an arena, so two of their calls must never run at the same time on the
device. Calls on one stream are ordered by it. When a call comes on another stream than the last
one, that stream is made to wait for the last one; nothing is recorded while callers stay on one
stream, so it costs them nothing.
"""

from __future__ import annotations

import torch

from moert.errors import StateError


def refuse_inside_capture(device: torch.device, what: str) -> None:
    """For what allocates or waits: either would break a capture under way on the device's current stream.

    Raises:
        StateError: there is one.
    """
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise StateError(f"{what}: not possible while the current stream is capturing")


class StreamOrder:
    """Orders successive calls on one device; the caller holds the group's lock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None
        self.last_raw: int | None = None
        self._event = torch.cuda.Event()
        self.record_each = False

    def switch(self, raw: int) -> None:
        """Make the current stream, whose handle is `raw`, wait for what the last stream was given.

        Raises:
            StateError: the last stream is being captured by now; nothing changed.
        """
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None:
            if not self.record_each:
                self._refuse_if_captured(self._last)
                self._event.record(self._last)
            stream.wait_event(self._event)
        self._last, self.last_raw = stream, raw
        # torch's own streams live for ever and have small ids; the id of an external stream is its
        # address, and its owner may destroy it before the next call: then only an event recorded now helps
        self.record_each = raw != 0 and stream.stream_id == stream.cuda_stream

    def _refuse_if_captured(self, last: torch.cuda.Stream) -> None:
        """An event recorded now on a stream under capture would draw the waiting stream into that capture.

        Raises:
            StateError: it is.
        """
        if last.cuda_stream == 0:  # nobody can capture the null stream
            return
        with torch.cuda.stream(last):
            captured = torch.cuda.is_current_stream_capturing()
        if captured:
            raise StateError(
                "the stream of the last call is being captured, so this stream cannot wait for what was "
                "launched there; call on another stream before that capture begins, or after it"
            )

    def record(self) -> None:
        """After a call on an external stream: mark its end while the stream is known to be alive."""
        assert self._last is not None
        self._event.record(self._last)
        # the next stream waits for that whatever its handle: a new one may have that of a destroyed one
        self.last_raw = None
