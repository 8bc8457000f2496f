"""The caller's default device and dtype are his own: nothing that moert makes follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runtime_cases import BACKENDS, CFG, MAX_TOKENS, assert_close, make_case
from test_torch_experts_cost import tensor_allocations

from moert import ExpertWeights, MoERuntime, Routing, TopK, sort
from moert.steps.routing.reference import route_reference
from moert.tuning.check import reference_on_host

Surroundings = Callable[[], AbstractContextManager[object]]
# groups and a bias: every table of the router
GROUPED = Routing("sigmoid", True, True, 2, 1, "top2_sum", 2.5)
ROUTED = replace(CFG, num_experts=6, routing=GROUPED)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def device_context() -> AbstractContextManager[object]:
    return torch.device("meta")


everywhere = pytest.mark.parametrize(
    "surroundings", [default_dtype, default_device, device_context]
)


@everywhere
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runtime_made_and_called_there(surroundings: Surroundings, backend: str) -> None:
    """Direct and sorted plans, chunks, live counts, routing, updates."""
    sizes = (2, 7, *([2 * MAX_TOKENS + 3] if backend == "torch" else []))
    cases = [make_case(ROUTED, tokens) for tokens in sizes]
    logits = torch.randn(3, 6)
    live = torch.tensor(2, dtype=torch.int32)
    weights = ExpertWeights.random(ROUTED)
    with surroundings():
        rt = MoERuntime(ROUTED, weights, backend=backend, max_tokens=MAX_TOKENS, buckets=(1, 2, 5))
    outside = MoERuntime(ROUTED, weights, backend=backend, max_tokens=MAX_TOKENS, buckets=(1, 2, 5))
    for layer in (rt, outside):
        with surroundings():
            for case in cases:
                case.call(layer)
                case.call(layer, num_valid=live, pad="zero")
                case.call(layer)
            topk = layer.route(logits)
            layer.route(logits, num_valid=live)
            layer.update_weights(w2=layer.weights.w2)
        for case in cases:
            assert_close(case.out, case.expected(layer))
        expected = route_reference(logits, ROUTED, weights.correction_bias)
        assert torch.equal(topk.ids, expected.ids)
        torch.testing.assert_close(topk.weights, expected.weights)


@pytest.mark.parametrize("surroundings", [default_dtype, device_context])
def test_no_allocation_there(surroundings: Surroundings) -> None:
    """A constant of another dtype would be converted at every call."""
    with surroundings():
        rt = MoERuntime(ROUTED, ExpertWeights.random(ROUTED), max_tokens=MAX_TOKENS)
    case, logits = make_case(ROUTED, 7), torch.randn(7, 6)

    def calls() -> None:
        with surroundings():
            case.call(rt)
            rt.route(logits)

    calls()
    assert tensor_allocations(calls) == []


@everywhere
def test_weights_made_and_read_there(
    surroundings: Surroundings, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint("deepseek_v3")
    for make in (lambda: ExpertWeights.random(ROUTED), lambda: MoERuntime(path, layer=1).weights):
        expected = make()
        with surroundings():
            made = make()
        assert made.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(made.tensors()[name], tensor, rtol=0, atol=0)


@everywhere
def test_sort_there(surroundings: Surroundings) -> None:
    ids, weights = torch.tensor([[0, 3], [2, 0], [-1, 2]]), torch.rand(3, 2)
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    for expert_mask in (None, mask):
        expected = sort(ids, weights, 4, 2, expert_mask=expert_mask)
        with surroundings():
            rows = sort(ids, weights, 4, 2, expert_mask=expert_mask)
        used = int(expected.num_valid_ids[0])
        assert torch.equal(rows.num_valid_ids, expected.num_valid_ids)
        assert torch.equal(rows.sorted_token_ids[:used], expected.sorted_token_ids[:used])
        assert torch.equal(rows.sorted_weights[:used], expected.sorted_weights[:used])


@everywhere
def test_a_check_on_the_host_there(surroundings: Surroundings) -> None:
    case, weights = make_case(CFG, 3), ExpertWeights.random(CFG)
    nobody = TopK(case.topk.weights, torch.full_like(case.topk.ids, -1))
    for topk in (case.topk, nobody):
        expected = reference_on_host(case.x, topk, weights, CFG)
        with surroundings():
            found = reference_on_host(case.x, topk, weights, CFG)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
