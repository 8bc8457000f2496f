"""Replays, eager launches and captures as the host arranges them, on a GPU that is not there."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from fake_gpu import BUCKETS, CFG, MAX_TOKENS, FakeBackend, FakeGpu

from moert import device_executor
from moert.call import call_key
from moert.device_executor import DeviceExecutor
from moert.errors import StateError
from moert.plan import Choice
from moert.topk import TopK


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


KERNELS = ["gate_up_direct_kernel", "down_direct_kernel"]


class Call:
    """The tensors of one call; `skew` elements off alignment."""

    def __init__(self, tokens: int, skew: int = 0) -> None:
        buffer = torch.randn(tokens * CFG.hidden_size + skew)
        self.x = buffer[skew:].view(tokens, -1)
        self.topk = TopK(torch.rand(tokens, CFG.top_k), torch.zeros(tokens, CFG.top_k).int())
        self.out = torch.full((tokens, CFG.hidden_size), float("nan"))

    def run(self, layer: DeviceExecutor, num_valid: torch.Tensor | None = None) -> None:
        key = call_key(self.x, self.topk, self.out, num_valid, "keep")
        layer.run(key, self.x, self.topk, self.out, num_valid, layer.capturing())

    def check(self, live: int | None = None) -> None:
        expected = 2 * self.x * self.topk.weights.sum(1, keepdim=True)
        live = len(self.x) if live is None else live
        torch.testing.assert_close(self.out[:live], expected[:live])
        assert self.out[live:].isnan().all()


def check_calls(layer: DeviceExecutor) -> None:
    """Every T, twice with other tensors and once again with known ones."""
    for tokens in range(1, MAX_TOKENS + 1):
        calls = [Call(tokens), Call(tokens)]
        for call in (*calls, calls[1]):
            call.out.fill_(float("nan"))
            call.run(layer)
            call.check()


def counts(**some: int) -> dict[str, int]:
    return {"replays": 0, "eager": 0, "captured": 0, "rebinds": 0, **some}


def test_replays_follow_the_tensors(gpu: FakeGpu) -> None:
    layer = gpu.layer(gpu.group())
    check_calls(layer)
    inside, beyond = BUCKETS[-1], MAX_TOKENS - BUCKETS[-1]
    assert layer.counts == counts(replays=3 * inside, rebinds=2 * inside, eager=3 * beyond)
    assert len(gpu.graphs) == len(BUCKETS)


def test_kernels_of_all_plans_are_compiled_together(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first layer's programs, and once: those of the next layers are compiled by then."""
    together: list[list[Any]] = []

    def jobs(backend: Any, tokens: int, choice: Choice, aligned: bool = True) -> tuple[Any, ...]:
        return (tokens, aligned), ("compiled already", aligned)

    monkeypatch.setattr(FakeBackend, "compile_jobs", jobs)
    monkeypatch.setattr(
        device_executor, "compile_together", lambda found: together.append(list(found))
    )
    group = gpu.group()
    group.kernel_cache["compiled already", True] = None
    layer = gpu.layer(group)
    group.members.add(layer)
    gpu.layer(group)
    limits = [*BUCKETS, MAX_TOKENS]
    last = [(MAX_TOKENS, False), ("compiled already", False)]
    assert together == [[(tokens, True) for tokens in limits] + last]


def test_the_live_count_is_the_callers(gpu: FakeGpu) -> None:
    layer, call, live = gpu.layer(gpu.group()), Call(5), torch.tensor(3, dtype=torch.int32)
    call.run(layer, live)
    call.check(live=3)
    call.run(layer)
    call.check()
    assert layer.counts == counts(replays=2, rebinds=2)


def test_where_things_are_launched(gpu: FakeGpu) -> None:
    """Graphs of the null stream go to one that blocks it; kernels to the caller's; switches wait."""
    layer, other = gpu.layer(gpu.group()), gpu.stream("other", 0x5001)
    Call(2).run(layer)
    Call(12).run(layer)
    assert gpu.log == ["graph on blocking", *(f"{k} on null" for k in KERNELS)]
    gpu.log.clear()
    with gpu.on(other):
        Call(2).run(layer)
        Call(2).run(layer)
    waits = ["record null", "other waits for event of null"]
    assert gpu.log == [*waits, "graph on other", "graph on other"]


def test_unaligned_tensors_take_the_largest_plan(gpu: FakeGpu) -> None:
    group = gpu.group()
    layer, call = gpu.layer(group), Call(2, skew=1)
    call.run(layer)
    call.check()
    assert layer.counts == counts(eager=1)
    note = f"not 16-byte aligned take the plan of {MAX_TOKENS} tokens"
    assert [note in text for text in group.notes] == [True]
    gpu.layer(group)  # which shares: nothing is said again
    assert len(group.notes) == 1


def test_nodes_in_any_order(gpu: FakeGpu) -> None:
    gpu.backwards = True
    group = gpu.group()
    check_calls(gpu.layer(group))
    assert all(plan.captured for plan in group.plans[:-1])


def test_functions_under_other_handles(gpu: FakeGpu) -> None:
    gpu.other_handles = True
    group = gpu.group()
    check_calls(gpu.layer(group))
    assert all(plan.captured for plan in group.plans[:-1])


def test_weights_that_nobody_has_filled_yet(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN out of a replay and out of a launch are the same bits: no reason to do without graphs."""
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.full(shape, float("nan"))
    )  # of the scores
    monkeypatch.setattr(torch, "full_like", lambda x, *_, **__: torch.full(x.shape, float("nan")))
    group = gpu.group()
    gpu.layer(group)
    assert all(plan.captured for plan in group.plans[:-1])


class OldGraph:
    """Before torch could keep what a graph was instantiated from."""

    instantiate = raw_cuda_graph = raw_cuda_graph_exec = None


def spoil(gpu: FakeGpu, how: str, patch: pytest.MonkeyPatch) -> None:
    if how == "old torch":
        patch.setattr(torch.cuda, "CUDAGraph", OldGraph)
    elif how == "torch without handles":
        patch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"instantiate": None}))
    elif how == "backwards":
        gpu.backwards = gpu.other_handles = True
    elif how == "no driver":

        def fail(hip: bool) -> Any:
            raise StateError("graph driver: not available")

        patch.setattr("moert.share.GraphDriver", fail)
    else:
        what, bucket = how.split()
        # captured from the largest to the smallest
        getattr(gpu, what).add(len(BUCKETS) - 1 - BUCKETS.index(int(bucket)))


FAULTS = {
    "old torch": "CUDAGraph has no keep_graph",
    "torch without handles": "CUDAGraph has no raw_cuda_graph, raw_cuda_graph_exec",
    "no driver": "graph driver: not available",
    "refuses 8": "GraphExecKernelNodeSetParams returned error 801",
    "refuses 1": "GraphExecKernelNodeSetParams returned error 801",
    **{f"ignores {b}": rf"graphs of \[{b}\] tokens with updated nodes differ" for b in BUCKETS},
    "backwards": r"graphs of \[1, 3, 8\] tokens with updated nodes differ",
}


@pytest.mark.parametrize("how", FAULTS)
def test_without_updates_kernels_are_launched_one_by_one(
    how: str,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(gpu, how, monkeypatch)
    group = gpu.group()
    layer = gpu.layer(group)
    check_calls(layer)
    assert layer.counts == counts(eager=3 * MAX_TOKENS)
    assert not any(plan.captured for plan in group.plans)
    reason = [text for text in group.notes if text.startswith("no graphs on this device")]
    assert len(reason) == 1
    with pytest.raises(AssertionError, match=FAULTS[how]):
        raise AssertionError(reason[0])
    second = gpu.layer(group)  # it does not try again
    assert len(group.notes) == 2
    check_calls(second)


def test_a_layer_whose_graphs_fail_though_others_have_some(gpu: FakeGpu) -> None:
    group = gpu.group()
    first = gpu.layer(group)
    gpu.ignores = {len(BUCKETS)}  # the first graph of the second layer
    second = gpu.layer(group)
    check_calls(first)
    check_calls(second)
    assert first.counts["replays"] and not second.counts["replays"]
    assert all(plan.captured for plan in group.plans[:-1])
    assert "a layer has no graphs, its kernels go one by one: graphs of [8]" in group.notes[-1]


def test_what_shares_waits_for_the_calls_of_others(gpu: FakeGpu) -> None:
    """It runs every kernel once at start, on the arena that their calls still use."""
    group = gpu.group()
    first = DeviceExecutor(group, gpu.backend())
    assert gpu.log[0] == "capture waits for null"
    group.join(first)
    gpu.log.clear()
    DeviceExecutor(group, gpu.backend())
    assert gpu.log[:2] == ["synchronize", "capture waits for null"]


def test_joining_somebodys_capture(gpu: FakeGpu) -> None:
    """No event, no graph of ours; the scratch is that of the arena for captures."""
    group = gpu.group()
    layer, stream = gpu.layer(group), gpu.stream("engine", 0x5001)
    Call(2).run(layer)
    gpu.log.clear()
    graph, call = gpu.graph_class(keep_graph=True), Call(3)
    with gpu.on(stream):
        graph.capture_begin(None, "")
        call.run(layer)
        graph.capture_end()
    assert gpu.log == [] and call.out.isnan().all()
    assert layer.counts == counts(replays=1, rebinds=1, captured=1)
    for launch, values in graph.captured:
        assert group.capture_arena.contains(launch.h)
        launch.execute([value.value for value in values])
    call.check()
    off = gpu.group("host")
    off.capture_arena = None
    bare = gpu.layer(off)
    with gpu.on(stream):
        graph.capture_begin(None, "")
        with pytest.raises(StateError, match="graphs='off' keeps no arena for that"):
            bare.capturing()
        graph.capture_end()


def test_the_last_stream_is_being_captured(gpu: FakeGpu) -> None:
    """An event recorded there would draw the caller's stream into that capture: refused, nothing done."""
    layer = gpu.layer(gpu.group())
    engine, other = gpu.stream("engine", 0x5001), gpu.stream("other", 0x5002)
    with gpu.on(engine):
        Call(2).run(layer)
    gpu.captures[engine.cuda_stream] = None
    gpu.log.clear()
    call = Call(2)
    for _ in range(2):
        with gpu.on(other), pytest.raises(StateError, match="last call is being captured"):
            call.run(layer)
    assert gpu.log == [] and call.out.isnan().all()
    assert layer.counts == counts(replays=1, rebinds=2)
    del gpu.captures[engine.cuda_stream]
    with gpu.on(other):
        call.run(layer)
    call.check()
    assert gpu.log[0] == "record engine"


@pytest.mark.parametrize("how", ["closed", "dropped", "both"])
def test_the_stream_is_given_back_once(how: str, gpu: FakeGpu) -> None:
    group = gpu.group()
    layers = [gpu.layer(group), gpu.layer(group)]
    assert gpu.blocking == ["open"]
    if how != "dropped":
        for layer in layers:
            layer.close()
            group.leave(layer)
        assert gpu.blocking == ["open", "destroyed"] and group.closed
    if how != "closed":
        del group, layers[:]
        if how == "both":
            del layer
        gc.collect()
    assert gpu.blocking == ["open", "destroyed"]
