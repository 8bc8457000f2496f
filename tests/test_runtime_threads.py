"""Threads, memory and counts of a runtime on a CPU."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from runtime_cases import BACKENDS, CFG, MAX_TOKENS, Case, assert_close, make_case, make_runtime
from test_torch_experts_cost import tensor_allocations

from moert.errors import StateError


def in_threads(work: Any, arguments: list[Any]) -> list[BaseException]:
    """Runs `work` once for each argument, all at once; what was raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(arguments))

    def run(argument: Any) -> None:
        try:
            start.wait(10)
            work(argument)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize(("backend", "calls"), [("torch", 60), ("triton", 2)])
def test_threads_on_runtimes_that_share(backend: str, calls: int) -> None:
    """One arena, several threads, each with its own tensors and out."""
    first = make_runtime(backend)
    second = make_runtime(backend, seed=1, share=first)

    def work(number: int) -> None:
        rt = (first, second)[number % 2]
        cases = [make_case(CFG, tokens, seed=number) for tokens in (1, 3, 7)]
        expected = [case.expected(rt) for case in cases]
        for _ in range(calls):
            for case, y in zip(cases, expected, strict=True):
                assert_close(case.call(rt), y)
                case.out.fill_(float("nan"))

    assert in_threads(work, [0, 1, 2, 3]) == []
    assert first.stats()["calls"] == second.stats()["calls"] == 2 * 3 * calls


def test_closing_while_others_call() -> None:
    """A call is done or refused, never half done."""
    for round_ in range(20):
        rt = make_runtime("torch")
        done: list[torch.Tensor] = []

        def work(number: int, rt: Any = rt, done: list[torch.Tensor] = done) -> None:
            if number == 0:
                rt.close()
                return
            for _ in range(50):
                case = make_case(CFG, 3, seed=number)
                done.append(case.call(rt))
                rt.route(torch.zeros(2, CFG.num_experts))

        errors = in_threads(work, [1, 2, 0])
        assert all(isinstance(error, StateError) for error in errors), (round_, errors)
        assert not any(y.isnan().any() for y in done)


def test_updates_while_others_call() -> None:
    """Every result is of the old weights or of the new ones, never of some of both."""
    rt = make_runtime("torch")
    case = make_case(CFG, 6, strange=0.0)
    old, new = (rt.weights.w2.clone() * factor for factor in (1.0, -1.0))
    expected = case.expected(rt)

    def work(number: int) -> None:
        for turn in range(100):
            if number == 0:
                rt.update_weights(w2=new if turn % 2 == 0 else old)
            else:
                mine = Case(case.x, case.topk, torch.empty_like(case.out))
                y = mine.call(rt)
                assert_close(y if (y * expected).sum() > 0 else -y, expected)

    assert in_threads(work, [0, 1, 2]) == []


def test_an_update_waits_for_the_call_under_way() -> None:
    rt = make_runtime("torch")
    update = threading.Thread(target=rt.update_weights, kwargs={"w2": torch.zeros(5, 40, 24)})
    with rt._group.lock:  # as in the middle of a call
        update.start()
        update.join(0.2)
        assert update.is_alive() and rt.weights.w2.any()
    update.join(10)
    assert not update.is_alive() and not rt.weights.w2.any()


ALLOCATING = {
    "float32": CFG,
    "float16": replace(CFG, dtype="float16", activation="gelu_tanh", bias=True),
    "ungated": replace(CFG, activation="relu2", gated=False),
}


@pytest.mark.parametrize("name", ALLOCATING)
def test_nothing_is_allocated(name: str) -> None:
    """Whatever T up to max_tokens, first call or not, with out= or without."""
    cfg = ALLOCATING[name]
    rt = make_runtime("torch", cfg)
    sizes = range(1, MAX_TOKENS + 1)
    dtypes = (torch.int32, torch.int64)
    cases = [make_case(cfg, tokens, ids=dtypes[tokens % 2]) for tokens in sizes]
    counts = [torch.tensor(tokens - 1, dtype=torch.int32) for tokens in sizes]
    logits = [torch.randn(tokens, cfg.num_experts) for tokens in sizes]

    def calls() -> None:
        for case, live, scores in zip(cases, counts, logits, strict=True):
            case.call(rt)
            case.call(rt, num_valid=live, pad="zero")
            rt.forward(case.x, case.topk)
            rt.route(scores)
            rt.route(scores, num_valid=live)

    assert tensor_allocations(lambda: torch.empty(100)) == [400]  # the profiler sees them
    assert tensor_allocations(calls) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_adds_up(backend: str) -> None:
    rt = make_runtime(backend)
    memory = rt.memory()
    assert memory["total"] == sum(v for name, v in memory.items() if name != "total")
    assert memory["weights"] == rt.weights.nbytes
    assert memory["arena"] == rt._group.arena.nbytes == max(p.scratch_bytes for p in rt.plan())
    row = 40 * 4 + 2 * (4 + 4)  # of an output, and of ids and weights
    assert memory["results"] == 2 * MAX_TOKENS * row
    assert memory["capture_arena"] == memory["graphs"] == 0
    # the router of the CPU has scratch of its own: some words for every logit
    per_logit = memory["routing"] / (MAX_TOKENS * CFG.num_experts)
    assert 30 < per_logit < 60 if backend == "torch" else memory["routing"] == 0


def test_stats() -> None:
    rt = make_runtime("torch")
    nothing = dict.fromkeys(
        ("calls", "replays", "eager", "captured", "rebinds", "chunks", "routes"), 0
    )
    assert rt.stats() == nothing
    for tokens in (0, 1, 8, 9, 17):
        make_case(CFG, tokens).call(rt)
    rt.route(torch.zeros(3, CFG.num_experts))
    rt.route(torch.zeros(0, CFG.num_experts))
    assert rt.stats() == {**nothing, "calls": 5, "chunks": 5, "eager": 7, "routes": 2}
    rt.stats()["calls"] = 99  # a copy
    assert rt.stats()["calls"] == 5
