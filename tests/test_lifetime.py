"""What a runtime leaves behind: when it is dropped, closed by many, half built, or met inside a capture."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import make_weights
from runtime_cases import BACKENDS, BUCKETS, CFG, MAX_TOKENS, check_call, make_case, make_runtime

from moert import MoERuntime, build, lifetime, runtime
from moert.errors import ConfigError, StateError
from moert.host_executor import HostExecutor
from moert.share import ShareGroup


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def groups() -> int:
    return sum(type(thing) is ShareGroup for thing in gc.get_objects())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_runtime_is_gone_at_once(backend: str) -> None:
    """No reference leads back to it: gigabytes do not wait for the garbage collector."""
    rt = make_runtime(backend)
    other = make_runtime(backend, seed=1, share=rt)
    for layer in (rt, other):
        check_call(layer, make_case(CFG, 7))
        layer.route(torch.zeros(2, CFG.num_experts))
    group, arena = weakref.ref(rt._group), weakref.ref(rt._group.arena)
    weights = [weakref.ref(layer.weights.w13) for layer in (rt, other)]
    del rt, layer
    assert weights[0]() is None and arena() is not None
    check_call(other, make_case(CFG, 2))
    del other
    assert [ref() for ref in (*weights, group, arena)] == [None] * 4


def test_a_dropped_runtime_does_not_hold_what_others_close() -> None:
    dropped = make_runtime("torch")
    rt = make_runtime("torch", seed=1, share=dropped)
    arena = weakref.ref(rt._group.arena)
    del dropped
    gc.collect()
    rt.close()
    assert arena() is None


def test_a_closed_runtime_keeps_no_weights(tiny_checkpoint: Callable[..., Path]) -> None:
    """Those that it read itself are gone with `with`; those of the caller are the caller's."""
    with MoERuntime(tiny_checkpoint("mixtral"), layer=0, max_tokens=4) as rt:
        read = [weakref.ref(t) for t in rt.weights.tensors().values()]
    gc.collect()
    assert [ref() for ref in read] == [None] * len(read)
    with pytest.raises(StateError, match="weights: the runtime is closed"):
        _ = rt.weights
    weights = make_weights(CFG)
    before = weights.w13.clone()
    MoERuntime(CFG, weights, max_tokens=4).close()
    assert torch.equal(weights.w13, before)


def test_many_close_at_once() -> None:
    """The second to come finds it closed and frees nothing again."""
    rt = make_runtime("torch")
    other = make_runtime("torch", seed=1, share=rt)
    errors: list[BaseException] = []

    def close() -> None:
        try:
            rt.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(4)]
    with rt._group.lock:
        for thread in threads:
            thread.start()
        time.sleep(0.2)  # all of them found it open and wait
    for thread in threads:
        thread.join(10)
    assert errors == []
    check_call(other, make_case(CFG, 3))
    arena = weakref.ref(other._group.arena)
    other.close()
    assert arena() is None


STAGES: dict[str, tuple[Any, str]] = {
    "weights": (build, "_weights"),
    "buffers": (ShareGroup, "__init__"),
    "plans": (build, "plan_buckets"),
    "arena": (ShareGroup, "make_arenas"),
    "programs": (HostExecutor, "__init__"),
    "end": (ShareGroup, "join"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_construction_that_fails_leaves_nothing(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an allocation may fail at every step: the error is the caller's to see, the memory is free."""
    gc.collect()
    before, alive = groups(), len(lifetime._LIVE)
    weights = make_weights(CFG)
    first, tensor = make_runtime("torch"), weakref.ref(weights.w13)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            MoERuntime(CFG, weights, max_tokens=MAX_TOKENS, buckets=BUCKETS)
        if stage in ("weights", "programs", "end"):
            with pytest.raises(torch.OutOfMemoryError, match="planted"):
                MoERuntime(CFG, weights, share=first)
    del weights
    gc.collect()
    assert tensor() is None
    assert groups() == before + 1 and len(lifetime._LIVE) == alive + 1
    check_call(first, make_case(CFG, 7))
    arena = weakref.ref(first._group.arena)
    first.close()
    assert arena() is None  # what failed to join does not hold it


def test_a_refused_construction_changes_nothing_shared() -> None:
    first = make_runtime("torch")
    notes = list(first._group.notes)
    with pytest.raises(ConfigError):
        MoERuntime(CFG, make_weights(CFG), share=first, max_tokens=3)
    assert list(first._group.members) == [first._executor] and first._group.notes == notes


def test_the_shared_runtime_is_closed_while_another_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By another thread, after share= was looked at: what joins finds nothing left to share."""
    first = make_runtime("torch")
    load = build._weights

    def close_first(*arguments: Any) -> Any:
        first.close()
        return load(*arguments)

    alive, weights = len(lifetime._LIVE), make_weights(CFG)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_weights", close_first)
        with pytest.raises(StateError, match="share: the runtime is closed; make a new MoERuntime"):
            MoERuntime(CFG, weights, share=first)
    assert len(lifetime._LIVE) == alive - 1
    assert first._group.closed and first._group.arena is None and not first._group.members


def test_what_a_closed_runtime_shared_can_be_joined_through_the_others() -> None:
    first = make_runtime("torch")
    second = make_runtime("torch", seed=1, share=first)
    first.close()
    with pytest.raises(StateError, match="share: the runtime is closed"):
        make_runtime("torch", seed=2, share=first)
    check_call(make_runtime("torch", seed=2, share=second), make_case(CFG, 3))


@pytest.mark.parametrize("what", ["close", "update_weights"])
def test_refused_inside_a_capture(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wait for the device, which would break the capture: as if there were one."""
    rt = make_runtime("torch")
    old, new = rt.weights.w2.clone(), torch.zeros_like(rt.weights.w2)
    uses = {"close": rt.close, "update_weights": lambda: rt.update_weights(w2=new)}

    def refuse(device: torch.device, name: str) -> None:
        assert device == rt.device
        raise StateError(f"{name}: planted")

    with monkeypatch.context() as patch:
        for module in (lifetime, runtime):
            patch.setattr(module, "refuse_inside_capture", refuse)
        with pytest.raises(StateError, match=f"{what}: planted"):
            uses[what]()
    assert torch.equal(rt.weights.w2, old)
    check_call(rt, make_case(CFG, 3))
    uses[what]()
