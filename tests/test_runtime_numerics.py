"""What `forward` and `route` compute, for every T, storage and kind of argument, on both backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from runtime_cases import (
    BACKENDS,
    CFG,
    LAYERS,
    MAX_TOKENS,
    NAN,
    Case,
    assert_close,
    check_call,
    guarded,
    make_case,
    make_runtime,
    poison,
)

from moert import MoEConfig, MoERuntime, Routing, TopK
from moert.steps.experts_reference import experts_reference
from moert.steps.routing.reference import route_reference

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
INT32_MIN = -(2**31)


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize("tokens", [*range(MAX_TOKENS + 2), 2 * MAX_TOKENS + 3])
def test_every_number_of_tokens(backend: str, tokens: int) -> None:
    """Buckets, eager sizes, and chunks beyond max_tokens."""
    rt = make_runtime(backend)
    check_call(rt, make_case(CFG, tokens))
    case = make_case(CFG, tokens, seed=1)
    assert_close(rt.forward(case.x, case.topk), case.expected(rt))
    chunks = 0 if tokens <= MAX_TOKENS else -(-tokens // MAX_TOKENS)
    stats = rt.stats()
    assert (stats["calls"], stats["chunks"]) == (2, 2 * chunks)
    assert stats["eager"] == 2 * (chunks or min(tokens, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(backend: str, name: str) -> None:
    cfg, storage = LAYERS[name]
    rt = make_runtime(backend, cfg, storage)
    for tokens in (2, 7):
        check_call(rt, make_case(cfg, tokens))


@pytest.mark.parametrize(
    ("ids", "weights", "wide"),
    [
        (torch.int32, torch.float32, 3),
        (torch.int64, torch.float32, 0),
        (torch.int32, torch.float16, 0),
        (torch.int64, torch.float16, 3),
    ],
)
def test_every_kind_of_argument(
    backend: str, ids: torch.dtype, weights: torch.dtype, wide: int
) -> None:
    """Strided rows, ids that no expert has: 2**40 + 1 has somebody's low word."""
    cfg = replace(CFG, dtype="float16")
    rt = make_runtime(backend, cfg)
    for tokens in (2, 7):
        check_call(rt, make_case(cfg, tokens, 0, ids, weights, 0.4, wide))


def test_a_pair_in_either_order(backend: str) -> None:
    rt = make_runtime(backend)
    case = make_case(CFG, 2, strange=0.0)
    first = case.call(rt).clone()
    for pair in ((case.topk.weights, case.topk.ids), (case.topk.ids, case.topk.weights)):
        assert torch.equal(rt.forward(case.x, pair), first)
        assert torch.equal(rt(case.x, list(pair)), first)


def test_rows_and_slots_that_are_not_neighbours_of_anything(backend: str) -> None:
    """Single rows and single columns have strides that mean nothing; one row may stand for all."""
    cfg = replace(CFG, top_k=1)
    rt = make_runtime(backend, cfg)
    case = make_case(cfg, 4, strange=0.0)
    x = case.x[:1].expand(4, -1)
    topk = TopK(case.topk.weights[:1].expand(4, -1), case.topk.ids[:1].expand(4, -1))
    check_call(rt, Case(x, topk, case.out))
    one = make_case(cfg, 1, strange=0.0)
    check_call(
        rt, Case(one.x.as_strided((1, 40), (3, 1)), one.topk, one.out.as_strided((1, 40), (1, 1)))
    )


@pytest.mark.parametrize("tokens", [2, 4])
def test_unbalanced_routing(backend: str, tokens: int) -> None:
    rt = make_runtime(backend)
    for ids in ([4, 4], [0, 4], [-1, 2], [5, 2**30], [0, 0]):
        case = make_case(CFG, tokens)
        case.topk.ids.copy_(torch.tensor(ids).expand(tokens, 2))
        check_call(rt, case)


def test_weights_of_ids_that_nobody_has_are_of_no_interest(backend: str) -> None:
    rt = make_runtime(backend)
    for tokens in (2, 8):
        case = make_case(CFG, tokens, strange=0.5)
        strange = (case.topk.ids < 0) | (case.topk.ids >= CFG.num_experts)
        expected = case.expected(rt)
        case.topk.weights[strange] = NAN
        poison(rt)
        assert_close(case.call(rt), expected)


@pytest.mark.parametrize("pad", ["keep", "zero"])
@pytest.mark.parametrize("tokens", [2, 7, 11])
def test_live_count(backend: str, tokens: int, pad: str) -> None:
    """Rows from num_valid on: NaN is not read, `out` keeps or clears, what lies around it stays."""
    rt = make_runtime(backend)
    for value in (INT32_MIN, -1, 0, tokens - 1, tokens + 1):
        live = max(0, min(tokens, value))
        case = make_case(CFG, tokens, wide=2)
        expected = case.rows(live).expected(rt)
        case.x[live:] = NAN
        case.topk.weights[live:] = NAN
        case.topk.ids[live:] = 1
        case.out, buffer = guarded(tokens, 40, torch.float32, 44, 7.0)
        before = [tensor.clone() for tensor in (case.x, *case.topk)]
        poison(rt)
        num_valid = scalar(value) if value % 2 else scalar(value).view(1)
        assert case.call(rt, num_valid=num_valid, pad=pad) is case.out
        if live:
            assert_close(case.out[:live], expected)
        buffer[2 : 2 + live, 1:41] = 7.0
        if pad == "zero":
            assert not case.out[live:].any()
            case.out[live:] = 7.0
        assert (buffer == 7.0).all()
        assert num_valid.item() == value
        for tensor, old in zip((case.x, *case.topk), before, strict=True):
            torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)


def test_the_live_count_without_out(backend: str) -> None:
    rt = make_runtime(backend)
    case = make_case(CFG, 5)
    poison(rt)
    y = rt.forward(case.x, case.topk, num_valid=scalar(3), pad="zero")
    assert_close(y[:3], case.rows(3).expected(rt))
    assert y.shape == (5, 40) and not y[3:].any()


def test_same_bits(backend: str) -> None:
    """Whatever the arena holds, wherever the rows lie, whatever was called in between."""
    rt = make_runtime(backend)
    for tokens in (2, 5):
        case = make_case(CFG, tokens, strange=0.0)
        first = case.call(rt).clone()
        poison(rt)
        make_case(CFG, 3, seed=3).call(rt)
        other = make_case(CFG, tokens, strange=0.0, wide=3, ids=torch.int64)
        assert torch.equal(other.x, case.x)
        assert torch.equal(other.call(rt), first)
        more = rt.forward(case.x, case.topk, num_valid=scalar(tokens))
        assert torch.equal(more, first)


def test_padding_does_not_change_the_bits_of_live_rows(backend: str) -> None:
    rt = make_runtime(backend)
    case = make_case(CFG, 5)
    whole = case.call(rt, num_valid=scalar(4))[:4].clone()
    case.x[4:], case.topk.ids[4:] = 1e30, 0
    assert torch.equal(case.call(rt, num_valid=scalar(4))[:4], whole)


RULES = {
    "softmax": Routing(),
    "gpt-oss": Routing("softmax_topk"),
    "deepseek": Routing("sigmoid", True, True, 2, 1, "top2_sum", 2.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_route(backend: str, rule: str, dtype: torch.dtype) -> None:
    cfg = MoEConfig(6, 2, 8, 4, dtype="float32", routing=RULES[rule])
    rt = make_runtime(backend, cfg, seed=2)
    if cfg.routing.correction_bias:
        bias = torch.randn(6)
        rt = MoERuntime(
            cfg, replace(rt.weights, correction_bias=bias), backend=backend, max_tokens=8
        )
    for tokens in (0, 1, 3, MAX_TOKENS):
        logits = torch.randn(tokens, 9, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        got = rt.route(logits[:, 2:8])
        expected = route_reference(logits[:, 2:8], cfg, rt.weights.correction_bias)
        assert torch.equal(got.ids, expected.ids) and got.ids.dtype == torch.int32
        torch.testing.assert_close(got.weights, expected.weights)
    assert rt.stats()["routes"] == 4


def test_route_leaves_rows_that_are_not_live(backend: str) -> None:
    rt = make_runtime(backend)
    logits = torch.randn(5, CFG.num_experts)
    for value in (INT32_MIN, -1, 0, 3, 5, 2**31 - 1):
        live = max(0, min(5, value))
        for _ in range(2):  # both buffers
            got = rt.route(torch.zeros(5, CFG.num_experts))
            got.weights.fill_(7.0), got.ids.fill_(9)
        dead = logits.clone()
        dead[live:] = NAN
        got = rt.route(dead, num_valid=scalar(value))
        expected = route_reference(logits[:live], CFG)
        assert torch.equal(got.ids[:live], expected.ids) and (got.ids[live:] == 9).all()
        torch.testing.assert_close(got.weights[:live], expected.weights)
        assert (got.weights[live:] == 7.0).all()


def test_a_whole_token(backend: str) -> None:
    """Logits to ids and weights to the layer's output, and on into the next layer that shares."""
    first = make_runtime(backend)
    second = make_runtime(backend, seed=1, share=first)
    x, logits = torch.randn(4, 40), torch.randn(2, 4, CFG.num_experts)
    y: Any = x
    for rt, router in zip((first, second), logits, strict=True):
        y = rt.forward(y, rt.route(router))
    topks = [route_reference(router, CFG) for router in logits]
    middle = experts_reference(x, topks[0], first.weights, CFG)
    assert_close(y, experts_reference(middle, topks[1], second.weights, CFG))
