"""Routing by AITER's operator: its buffers, its numbers, and the calls and layers that ours serves."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from aiter_cases import CFG, NAN, make
from aiter_stand_in import Broken, StandIn
from aiter_stand_in_router import RouterStandIn, _topk_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from moert import ExpertWeights, MoEConfig, MoERuntime, Routing
from moert.backends.aiter_ops import ROUTE
from moert.backends.aiter_router import AiterRouter, refuses
from moert.steps.routing import route_reference

EIGHT = replace(CFG, num_experts=8, top_k=3)
# aiter/ops/moe_op.py at github.com/ROCm/aiter e4048607; the wheel has no such operator
SIGNATURE = (
    "topk_weights topk_indices token_expert_indices gating_output softmax_workspace need_renorm "
    "num_shared_experts=0 shared_expert_scoring_func="
)
BUFFERS = ("topk_weights", "topk_indices", "token_expert_indices", "gating_output")
WARMED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def operator(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> RouterStandIn:
    return RouterStandIn().install(monkeypatch)


def some_logits(tokens: int, experts: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers: every row has equals."""
    g = torch.Generator().manual_seed(tokens)
    return torch.randint(-3, 4, (tokens, experts), generator=g).to(dtype)


def poison(rt: MoERuntime) -> None:
    results = rt._group.results_for(False)
    results._weights.fill_(NAN)
    results._ids.fill_(-7)


def is_right(rt: MoERuntime, logits: torch.Tensor, **options: Any) -> bool:
    poison(rt)
    weights, ids = rt.route(logits, **options)
    expected = route_reference(logits, rt._group.described, rt.weights.correction_bias)
    close = torch.allclose(weights, expected.weights, rtol=1e-5, atol=0.0)
    return close and torch.equal(ids, expected.ids)


def note(rt: MoERuntime) -> str:
    (found,) = [n for n in rt.plan().notes if n.startswith("routing by")]
    return found


def test_the_stand_in_has_the_signature() -> None:
    parameters = inspect.signature(_topk_softmax).parameters
    empty = inspect.Parameter.empty
    got = [n if p.default is empty else f"{n}={p.default}" for n, p in parameters.items()]
    assert " ".join(got) == SIGNATURE
    assert tuple(parameters)[: len(ROUTE)] == ROUTE


@pytest.mark.parametrize("dtype", WARMED)
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_buffers_of_a_call(operator: RouterStandIn, tokens: int, dtype: torch.dtype) -> None:
    rt, logits = make(EIGHT), some_logits(tokens, dtype=dtype)
    assert [c.args["gating_output"].dtype for c in operator.calls] == WARMED
    operator.calls.clear()
    assert is_right(rt, logits)
    out = rt.route(logits)
    first, args = (call.args for call in operator.calls)
    # alternating results, written in place
    assert args["topk_weights"].data_ptr() == out.weights.data_ptr()
    assert args["topk_indices"].data_ptr() == out.ids.data_ptr()
    assert first["topk_weights"].data_ptr() != out.weights.data_ptr()
    assert args["gating_output"] is logits and args["need_renorm"] is True
    for name in BUFFERS[:3]:
        assert args[name].shape == (tokens, 3) and args[name].is_contiguous(), name
    assert args["softmax_workspace"].numel() == 0
    # one scratch for all calls, its first rows
    router = rt._executor._router
    assert isinstance(router, AiterRouter) and router._scratch.shape == (6, 3)
    for call in (first, args):
        assert call["token_expert_indices"].data_ptr() == router._scratch.data_ptr()
    assert rt.memory()["routing"] == router.nbytes == 6 * 3 * 4
    assert "by AITER's _topk_softmax" in note(rt)


@pytest.mark.parametrize("experts", [1, 2, 16, 128, 256])
@pytest.mark.parametrize(
    "rule", [Routing(), Routing(renormalize=False), Routing("softmax_topk", renormalize=False)]
)
def test_right_numbers(operator: RouterStandIn, experts: int, rule: Routing) -> None:
    cfg = MoEConfig(experts, min(experts, 4), 128, 128, dtype="float16", routing=rule)
    rt = make(cfg)
    operator.calls.clear()
    assert is_right(rt, some_logits(5, experts))
    assert is_right(rt, some_logits(5, experts) * 30)  # scores underflow; ranks are those of logits
    assert len(operator.calls) == 2


class Operations(TorchDispatchMode):
    """Names of torch's operations while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_a_call_allocates_and_copies_nothing(operator: RouterStandIn) -> None:
    rt, logits = make(EIGHT), some_logits(3)
    operator.inert = True
    with Operations() as first:
        rt.route(logits)
    assert set(first.names) <= {"aten.slice", "aten.select"}  # views, made once
    with Operations() as again:
        rt.route(logits)
        rt.route(logits)
    assert again.names == []


def test_calls_that_ours_serves(operator: RouterStandIn) -> None:
    rt = make(EIGHT)
    operator.calls.clear()
    logits = some_logits(4)
    gaps = torch.zeros(4, 16)[:, :8].copy_(logits)
    odd = torch.zeros(33)[1:].view(4, 8).copy_(logits)
    assert is_right(rt, gaps) and is_right(rt, odd)
    assert is_right(rt, logits, num_valid=torch.tensor(4, dtype=torch.int32))
    poison(rt)
    few = rt.route(logits, num_valid=torch.tensor(2, dtype=torch.int32))
    assert few.weights[2:].isnan().all() and (few.ids[2:] == -7).all()
    assert operator.calls == []
    assert is_right(rt, logits) and len(operator.calls) == 1


@pytest.mark.parametrize(
    ("experts", "rule", "reason"),
    [
        (8, Routing("sigmoid"), "scoring='sigmoid' is no softmax"),
        (8, Routing(correction_bias=True), "no correction bias"),
        (8, Routing(num_groups=2, top_groups=1), "no groups"),
        (8, Routing(scaling_factor=2.5), "scaling_factor=2.5 is not 1"),
        (6, Routing(), "E=6 is not a power of two"),
        (512, Routing(), "E=512 is not a power of two up to 256"),
    ],
    ids=["scoring", "bias", "groups", "scaling", "six", "many"],
)
def test_layers_that_ours_serves(
    operator: RouterStandIn, experts: int, rule: Routing, reason: str
) -> None:
    cfg = MoEConfig(experts, 2, 128, 128, dtype="float16", routing=rule)
    weights = ExpertWeights.random(cfg, seed=1)
    if rule.correction_bias:
        weights = replace(weights, correction_bias=torch.linspace(0.0, 1.0, experts))
    rt = make(cfg, weights=weights)
    assert is_right(rt, some_logits(5, experts))
    assert operator.calls == []
    assert note(rt).startswith("routing by our kernel: ") and reason in note(rt)


def test_offsets_past_31_bits() -> None:
    cfg = MoEConfig(256, 2, 128, 128)
    assert refuses(cfg, 2**23 - 1) is None
    assert "pass 31 bits" in (refuses(cfg, 2**23) or "")


def test_an_aiter_without_the_operator(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    rt = make(EIGHT)
    assert is_right(rt, some_logits(3)) and "aiter.ops.moe_op does not import" in note(rt)
    module = RouterStandIn().install(monkeypatch)
    del module._topk_softmax
    assert "this aiter has no _topk_softmax" in note(make(EIGHT))

    def early(topk_weights: Any, topk_indices: Any, token_expert_indices: Any,
              gating_output: Any, need_renorm: bool) -> None:  # fmt: skip
        raise AssertionError

    module = RouterStandIn(early).install(monkeypatch)
    rt = make(EIGHT)
    assert "_topk_softmax of this aiter takes no softmax_workspace" in note(rt)
    assert is_right(rt, some_logits(3)) and module.calls == []


def test_an_operator_that_fails_at_first(operator: RouterStandIn) -> None:
    """As where its module cannot be built; layers that share do not try again."""
    operator.fault = RuntimeError("hipcc: not found")
    rt = make(EIGHT)
    operator.fault = None
    other = MoERuntime(EIGHT, ExpertWeights.random(EIGHT, seed=3), share=rt)
    for one in (rt, other):
        assert is_right(one, some_logits(3))
        assert note(one) == "routing by our kernel: _topk_softmax fails: RuntimeError"
    assert operator.calls == []


def test_layers_share_the_scratch(operator: RouterStandIn) -> None:
    rt = make(EIGHT)
    other = MoERuntime(EIGHT, ExpertWeights.random(EIGHT, seed=3), share=rt)
    assert len(operator.calls) == len(WARMED)  # the first layer's
    assert other._executor._router._scratch is rt._executor._router._scratch
    assert is_right(other, some_logits(3)) and is_right(rt, some_logits(3))


def test_shared_experts_are_not_routed_to(operator: RouterStandIn) -> None:
    """Launches see 9 experts and 4 slots, routing 8 and 3."""
    rt = make(replace(EIGHT, shared_experts=1))
    operator.calls.clear()
    assert is_right(rt, some_logits(3)) and len(operator.calls) == 1
    assert "by AITER's _topk_softmax" in note(rt)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(BUFFERS, 2)))
def test_no_two_buffers_can_be_exchanged(operator: RouterStandIn, one: str, other: str) -> None:
    rt, logits = make(EIGHT), some_logits(4)
    assert is_right(rt, logits)

    def exchange(args: dict[str, Any]) -> None:
        args[one], args[other] = args[other], args[one]

    operator.change = exchange
    try:
        assert not is_right(rt, logits)
    except Broken:
        return


@pytest.mark.parametrize("cut", ["rows", "renormalise", "all"])
def test_other_mistakes_are_noticed(operator: RouterStandIn, cut: str) -> None:
    rt, logits = make(EIGHT), some_logits(4)

    def change(args: dict[str, Any]) -> None:
        if cut == "rows":
            args["gating_output"] = args["gating_output"][:3]
        elif cut == "renormalise":
            args["need_renorm"] = False
        else:
            args["topk_weights"], args["topk_indices"] = (
                args[name].clone() for name in ("topk_weights", "topk_indices")
            )

    operator.change = change
    try:
        assert not is_right(rt, logits)
    except Broken:
        assert cut == "rows"
