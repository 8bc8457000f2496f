"""The runtime's contract beside the numbers: refusals, results, sharing, updates, life and death, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import make_weights
from runtime_cases import (
    BACKENDS,
    BUCKETS,
    CFG,
    MAX_TOKENS,
    NAN,
    Case,
    assert_close,
    check_call,
    make_case,
    make_runtime,
)

from moert import MoERuntime, TopK
from moert.errors import InputError, StateError, UnsupportedError, WeightsError

both = pytest.mark.parametrize("backend", BACKENDS)


def result(rt: MoERuntime, case: Case) -> torch.Tensor:
    return rt.forward(case.x, case.topk)


@both
def test_a_result_lives_until_the_call_after_next(backend: str) -> None:
    """Of the share group: layer n + 1 may read what layer n returned, and layer n + 2 overwrites it."""
    first = make_runtime(backend)
    second = make_runtime(backend, seed=1, share=first)
    cases = [make_case(CFG, tokens, seed=tokens, strange=0.0) for tokens in (3, 2, 1, 3)]
    runtimes, results = (first, second, first, second), []
    for number, (case, rt) in enumerate(zip(cases, runtimes, strict=True)):
        results.append(result(rt, case))
        for earlier in range(max(0, number - 1), number + 1):
            assert_close(results[earlier], cases[earlier].expected(runtimes[earlier]))
    addresses = [y.data_ptr() for y in results]
    assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
    make_case(CFG, 2).call(first)  # with out=, nothing is overwritten
    assert_close(results[3], cases[3].expected(second))


def test_routing_lives_until_the_call_after_next() -> None:
    rt = make_runtime("torch")
    a, b, c = (rt.route(torch.randn(3, CFG.num_experts)) for _ in range(3))
    assert a.ids.data_ptr() == c.ids.data_ptr() != b.ids.data_ptr()
    assert a.weights.data_ptr() == c.weights.data_ptr() != b.weights.data_ptr()
    y = rt.forward(torch.randn(3, 40), c)  # forward's results are others
    assert y.data_ptr() not in {t.data_ptr() for t in (*a, *b)}
    assert torch.equal(
        rt.route(torch.zeros(2, CFG.num_experts)).ids, torch.tensor([[0, 1]] * 2).int()
    )


@both
def test_runtimes_that_share_may_take_turns(backend: str) -> None:
    first = make_runtime(backend)
    others = [make_runtime(backend, seed=seed, share=first) for seed in (1, 2)]
    for tokens in (2, 7, 1, 5):
        for rt in (first, *others):
            check_call(rt, make_case(CFG, tokens))


def bad_calls() -> dict[str, dict[str, Any]]:
    case = make_case(CFG, 3)
    x, (weights, ids) = case.x, case.topk
    return {
        "x": {"x": x.double()},
        "x shape": {"x": x[:2]},
        "x list": {"x": [1.0]},
        "x sparse": {"x": x.to_sparse()},
        "x requires grad": {"x": x.clone().requires_grad_()},
        "weights require grad": {"topk": TopK(weights.clone().requires_grad_(), ids)},
        "x device": {"x": x.to("meta")},
        "ids": {"topk": TopK(weights, ids.short())},
        "pair": {"topk": (weights, weights)},
        "no pair": {"topk": weights},
        "out shape": {"out": torch.full((4, 40), NAN)},
        "out dtype": {"out": torch.full((3, 40), NAN).half()},
        "out is x": {"x": x, "out": x},
        "out requires grad": {"out": torch.zeros(3, 40, requires_grad=True)},
        "num_valid": {"num_valid": 3},
        "num_valid dtype": {"num_valid": torch.tensor(3)},
        "pad": {"pad": "mirror"},
    }


@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("name", bad_calls())
def test_a_refused_call_changes_nothing(name: str, with_out: bool) -> None:
    rt = make_runtime("torch")
    case = make_case(CFG, 3)
    last = result(rt, case)
    expected, stats = last.clone(), rt.stats()
    arguments = {"x": case.x, "topk": case.topk} | ({"out": case.out} if with_out else {})
    with pytest.raises(InputError):
        rt.forward(**(arguments | bad_calls()[name]))
    assert case.out.isnan().all()
    assert torch.equal(last, expected)
    assert rt.stats() == stats
    # the alternation has not moved
    assert result(rt, case).data_ptr() != last.data_ptr() == result(rt, case).data_ptr()


def test_a_refused_large_call_does_no_chunk() -> None:
    rt = make_runtime("torch")
    case = make_case(CFG, 3 * MAX_TOKENS)
    for bad in ({"pad": "none"}, {"num_valid": torch.tensor(1)}):
        with pytest.raises(InputError):
            case.call(rt, **bad)
    with pytest.raises(InputError, match="overlaps x"):
        rt.forward(case.x, case.topk, out=case.x)
    assert case.out.isnan().all()
    assert set(rt.stats().values()) == {0}


@pytest.mark.parametrize(
    "logits", [[0.0], torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 5).double()]
)
def test_a_refused_route_changes_nothing(logits: Any) -> None:
    rt = make_runtime("torch")
    before = rt.route(torch.zeros(3, CFG.num_experts))
    with pytest.raises(InputError, match="router_logits"):
        rt.route(logits)
    with pytest.raises(InputError, match="num_valid"):
        rt.route(torch.zeros(3, CFG.num_experts), num_valid=torch.tensor(1))
    with pytest.raises(InputError, match="got 9 rows, need at most max_tokens=8"):
        rt.route(torch.zeros(9, CFG.num_experts))
    assert rt.stats()["routes"] == 1
    assert rt.route(torch.zeros(3, CFG.num_experts)).ids.data_ptr() != before.ids.data_ptr()


def test_routing_that_needs_a_bias() -> None:
    cfg = replace(CFG, routing={"scoring": "sigmoid", "correction_bias": True})
    rt = make_runtime("torch", cfg)
    check_call(rt, make_case(cfg, 2))
    with pytest.raises(WeightsError, match="correction_bias: missing, need"):
        rt.route(torch.zeros(2, 5))


@both
def test_a_shard_of_fewer_experts_than_k(backend: str) -> None:
    """Most ids are of experts elsewhere: forward computes its part, and nothing can be routed here."""
    cfg = replace(CFG, num_experts=3, top_k=5)
    with make_runtime(backend, cfg) as rt:
        for tokens in (1, 5, 8, 11):
            check_call(rt, make_case(cfg, tokens, strange=0.6))
        assert rt.memory()["routing"] == 0
        message = (
            "route: top_k=5 exceeds num_experts=3, .* shard of a layer's; route where all are known"
        )
        with pytest.raises(UnsupportedError, match=message):
            rt.route(torch.zeros(2, 3))
        assert rt.stats()["routes"] == 0


def test_large_calls_inside_a_capture_are_refused_first() -> None:
    """As if the current stream were capturing: there is no second arena for more than the largest bucket."""
    rt = make_runtime("torch")
    rt._capturing = lambda: True
    for tokens in (BUCKETS[-1] + 1, MAX_TOKENS + 1):
        case = make_case(CFG, tokens)
        message = f"{tokens} rows inside a capture, .* largest bucket, 5; raise buckets="
        for out in (case.out, None):
            with pytest.raises(StateError, match=f"forward: {message}"):
                rt.forward(case.x, case.topk, out=out)
        with pytest.raises(StateError, match=f"route: {message}"):
            rt._route(torch.zeros(tokens, 5), None)
    assert set(rt.stats().values()) == {0}


@both
def test_updated_weights_are_seen(backend: str) -> None:
    cfg = replace(CFG, bias=True)
    rt, new = make_runtime(backend, cfg), make_weights(cfg, seed=7)
    other = make_runtime(backend, cfg, seed=1, share=rt)
    case, addresses = make_case(cfg, 2), {n: t.data_ptr() for n, t in rt.weights.tensors().items()}
    before = case.call(rt).clone()
    tensors = {name: getattr(new, name) for name in ("w13", "w2", "b13", "b2")}
    rt.update_weights(**tensors | {"w2": new.w2.double()})  # what converts is converted
    check_call(rt, case)
    assert not torch.equal(case.out, before)
    assert {n: t.data_ptr() for n, t in rt.weights.tensors().items()} == addresses
    assert all(torch.equal(getattr(rt.weights, n), t) for n, t in tensors.items())
    check_call(other, case)  # has its own


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"w3": torch.zeros(1)}, "w3: not among these weights"),
        ({"b13": torch.zeros(5, 48)}, "b13: not among these weights"),
        ({"w2": torch.zeros(5, 24, 40)}, r"w2: got \[5, 24, 40\], need \[5, 40, 24\]"),
        ({"w2": None}, r"w2: got NoneType, need \[5, 40, 24\]"),
    ],
)
def test_a_refused_update_changes_nothing(bad: dict[str, Any], message: str) -> None:
    rt = make_runtime("torch")
    before = rt.weights.w13.clone()
    with pytest.raises(WeightsError, match=message):
        rt.update_weights(w13=torch.zeros_like(before), **bad)
    assert torch.equal(rt.weights.w13, before)


def test_made_in_inference_mode_used_outside_and_the_other_way_round() -> None:
    with torch.inference_mode():
        inside = make_runtime("torch")
    check_call(inside, make_case(CFG, 3))
    inside.route(torch.zeros(3, 5))
    inside.update_weights(w2=torch.zeros_like(inside.weights.w2))
    outside = make_runtime("torch")
    with torch.inference_mode():
        check_call(outside, make_case(CFG, 3))
        outside.update_weights(w2=torch.zeros_like(outside.weights.w2))
    check_call(outside, make_case(CFG, 3))
