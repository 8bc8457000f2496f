"""Streams, threads and devices of callers: what is in flight is waited for, what is current stays current."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from gpu_support import DEVICE, ODD, REAL, Case, make_case, runtime

from moert import ExpertWeights, MoERuntime, StateError

pytestmark = pytest.mark.gpu

SLOW = 40_000_000  # cycles: tens of milliseconds


def outputs(rt: MoERuntime, cases: list[Case]) -> list[torch.Tensor]:
    return [rt.forward(case.x, case.topk, case.out).clone() for case in cases]


@pytest.mark.parametrize("tokens", [4, 80])
def test_an_update_waits_for_calls_in_flight(tokens: int) -> None:
    """A replay and an eager call behind a slow kernel on another stream: they see the old weights alone."""
    with runtime(ODD) as rt:
        case = make_case(ODD, tokens)
        (before,) = outputs(rt, [case])
        case.out.fill_(float("nan"))
        new = -rt.weights.w2.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(SLOW)
            rt.forward(case.x, case.topk, case.out)
        rt.update_weights(w2=new)
        assert torch.equal(case.out, before)
        assert torch.equal(outputs(rt, [case])[0], -before)


def test_a_layer_that_joins_waits_for_calls_in_flight() -> None:
    """Making it runs every kernel once, on the arena that the others' calls use."""
    with runtime(REAL) as rt:
        case = make_case(REAL, 96)
        (expected,) = outputs(rt, [case])
        # as many calls as making a layer takes: some are under way when its kernels run
        outs = torch.full((400, *case.out.shape), float("nan"), device=DEVICE).to(expected.dtype)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for out in outs:
                rt.forward(case.x, case.topk, out)
        with runtime(REAL, seed=1, share=rt):
            torch.cuda.synchronize()
            assert (outs == expected).all()


def test_threads_on_streams_of_their_own() -> None:
    """Layers that share, called from several threads at once."""
    first = runtime(REAL)
    layers = [first, runtime(REAL, seed=1, share=first)]
    cases = [make_case(REAL, tokens, seed=tokens) for tokens in (1, 16, 50, 90)]
    expected = [outputs(layer, cases) for layer in layers]
    torch.cuda.synchronize()
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        layer, outs = number % 2, [torch.empty_like(case.out) for case in cases]
        start.wait(10)
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(30):
                for case, out, want in zip(cases, outs, expected[layer], strict=True):
                    layers[layer].forward(case.x, case.topk, out)
                    if not torch.equal(out, want):
                        wrong.append(f"thread {number}, turn {turn}, {len(out)} tokens")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


def test_the_last_stream_is_being_captured() -> None:
    """What was launched there cannot be waited for: refused, and the capture is not harmed."""
    with runtime(ODD) as rt:
        case = make_case(ODD, 3)
        engine, other = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(engine):
            (expected,) = outputs(rt, [case])
        torch.cuda.synchronize()
        graph, mark = torch.cuda.CUDAGraph(), torch.zeros(4, device=DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=engine):
            mark.fill_(1.0)
            with torch.cuda.stream(other), pytest.raises(StateError, match="being captured"):
                rt.forward(case.x, case.topk, case.out)
        graph.replay()
        torch.cuda.synchronize()
        assert (mark == 1.0).all()
        case.out.fill_(float("nan"))
        with torch.cuda.stream(other):
            other.wait_stream(torch.cuda.current_stream())
            torch.cuda.synchronize()
            rt.forward(case.x, case.topk, case.out)
        torch.cuda.synchronize()
        assert torch.equal(case.out, expected)


def test_a_dropped_runtime_gives_its_stream_back() -> None:
    rt = runtime(ODD)
    case = make_case(ODD, 3)
    rt.forward(case.x, case.topk, case.out)
    given_back = rt._group._destroy_stream
    if given_back is None:
        pytest.skip("no stream of its own on this platform")
    assert given_back.alive
    del rt
    gc.collect()
    assert not given_back.alive
    with runtime(ODD) as other:
        other.forward(case.x, case.topk, case.out)
    torch.cuda.synchronize()
    assert not case.out.isnan().any()


def test_another_current_device() -> None:
    """A runtime works on its own device and leaves the caller's current device alone."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    second = torch.device("cuda", 1)
    weights = ExpertWeights.random(ODD, device=second)
    assert torch.cuda.current_device() == 0
    with MoERuntime(ODD, weights, tune="off", max_tokens=96, buckets=(1, 8)) as rt:
        assert rt.device == second
        for tokens in (1, 5, 50):
            case = make_case(ODD, tokens)
            x, out = case.x.to(second), case.out.to(second)
            topk = type(case.topk)(*(tensor.to(second) for tensor in case.topk))
            expected = runtime(ODD).forward(case.x, case.topk)
            rt.forward(x, topk, out)
            rt.route(torch.randn(tokens, ODD.num_experts, device=second))
            torch.cuda.synchronize(second)
            assert torch.cuda.current_device() == 0
            assert torch.equal(out.to(DEVICE), expected)
