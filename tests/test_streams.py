"""The order of calls on several streams, with streams that only write down what they are told."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from moert.errors import StateError
from moert.streams import StreamOrder

LOG: list[str] = []
DEVICE = torch.device("cuda", 0)


class FakeStream:
    """One of torch's own (a small id) or an external one (its id is its handle)."""

    def __init__(self, name: str, raw: int, external: bool = False) -> None:
        self.name, self.cuda_stream = name, raw
        self.stream_id = raw if external else raw % 64

    def wait_event(self, event: FakeEvent) -> None:
        LOG.append(f"{self.name} waits for {event.at}")


class FakeEvent:
    def __init__(self) -> None:
        self.at = "nothing"

    def record(self, stream: FakeStream) -> None:
        self.at = stream.name
        LOG.append(f"record {stream.name}")


A, B = FakeStream("A", 0x7F00_0000_1001), FakeStream("B", 0x7F00_0000_2002)
NULL = FakeStream("null", 0)
X, Y = (FakeStream(name, raw, True) for name, raw in (("X", 0x5000), ("Y", 0x6000)))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> StreamOrder:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    LOG.clear()
    return StreamOrder(DEVICE)


def call(order: StreamOrder, stream: FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What executors do around a launch."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    raw = stream.cuda_stream
    if raw != order.last_raw:
        order.switch(raw)
    LOG.append(f"call on {stream.name}")
    if order.record_each:
        order.record()


@pytest.mark.parametrize(
    ("streams", "log"),
    [
        # who stays on one stream pays for nothing
        ([A, A, A], ["call on A"] * 3),
        ([NULL, NULL], ["call on null"] * 2),
        ([A, B, B], ["call on A", "record A", "B waits for A", "call on B", "call on B"]),
        ([NULL, A], ["call on null", "record null", "A waits for null", "call on A"]),
        (
            [A, B, A],
            [
                *("call on A", "record A", "B waits for A", "call on B"),
                *("record B", "A waits for B", "call on A"),
            ],
        ),
        # an external stream may be gone before the next call: what it did is marked at once, and waited for
        # even by one with its handle, which may be another stream
        ([X, X], ["call on X", "record X", "X waits for X", "call on X", "record X"]),
        ([X, A], ["call on X", "record X", "A waits for X", "call on A"]),
        ([A, X], ["call on A", "record A", "X waits for A", "call on X", "record X"]),
        (
            [X, Y, A],
            [
                *("call on X", "record X", "Y waits for X", "call on Y", "record Y"),
                *("A waits for Y", "call on A"),
            ],
        ),
    ],
    ids=lambda value: "-".join(s.name for s in value) if isinstance(value[0], FakeStream) else "",
)
def test_order(
    streams: list[FakeStream],
    log: list[str],
    order: StreamOrder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream in streams:
        call(order, stream, monkeypatch)
    assert log == LOG
    last = streams[-1]
    assert order.last_raw == (None if last in (X, Y) else last.cuda_stream)


def test_the_runtime_asks_for_its_own_device(
    order: StreamOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def current_stream(device: Any) -> FakeStream:
        asked.append(device)
        return A

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    order.switch(A.cuda_stream)
    assert asked == [DEVICE]


def test_a_stream_under_capture_is_not_recorded_on(
    order: StreamOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited for that event would become part of the capture. The order stays as it was."""
    asked: list[Any] = []

    def stream(which: Any) -> Any:
        asked.append(which)
        return contextlib.nullcontext()

    call(order, A, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(StateError, match="stream of the last call is being captured"):
            call(order, B, monkeypatch)
    assert asked == [A] and LOG == ["call on A"]
    call(order, B, monkeypatch)
    assert LOG[1:] == ["record A", "B waits for A", "call on B"]


@pytest.mark.parametrize("last", [NULL, X])
def test_streams_that_need_no_such_look(
    last: FakeStream, order: StreamOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody captures the null stream; the end of an external one was recorded when it was not captured."""
    call(order, last, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(order, A, monkeypatch)
    assert LOG[-2:] == [f"A waits for {last.name}", "call on A"]
