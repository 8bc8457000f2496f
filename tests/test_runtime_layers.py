"""Layers of bfloat16 on a CPU, and layers of other storage in one share group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import make_weights, relative_error
from runtime_cases import BACKENDS, CFG, MAX_TOKENS, NAN, check_call, make_case, make_runtime

from moert import ExpertWeights, MoERuntime
from moert.errors import InputError, WeightsError
from moert.steps.routing.reference import route_reference

# roundings of gate/up, of the intermediate, of each expert's result and of out
TOLERANCE = 8e-3
BF16 = replace(CFG, dtype="bfloat16")
LAYERS = {
    "plain": (BF16, "plain"),
    "transposed": (BF16, "transposed"),
    "bias": (replace(BF16, bias=True, activation="gelu_tanh"), "plain"),
    "bias-float32": (replace(BF16, bias=True), "bias-float32"),
    "gpt-oss": (replace(BF16, bias=True, activation="swiglu_oai"), "interleaved-transposed"),
    "ungated": (replace(BF16, gated=False, activation="relu2"), "plain"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name: str) -> None:
    """Every T, both dtypes of weights, rows that are not live, chunks, no row of NaN, the same bits."""
    cfg, storage = LAYERS[name]
    rt = make_runtime("torch", cfg, storage)
    live = torch.tensor(2, dtype=torch.int32)
    for tokens in (*range(1, MAX_TOKENS + 2), 2 * MAX_TOKENS + 3):
        for weights in (torch.float32, torch.bfloat16):
            case = make_case(cfg, tokens, weights=weights, strange=0.1)
            expected = case.expected(rt)
            rt._group.arena.poison()
            y = case.call(rt).clone()
            assert relative_error(y, expected) <= TOLERANCE
            assert torch.equal(rt.forward(case.x, case.topk), y)
            case.x[2:] = NAN
            case.call(rt, num_valid=live, pad="zero")
            assert relative_error(case.out[:2], expected[:2]) <= TOLERANCE
            assert not case.out[2:].any()


def test_bfloat16_logits() -> None:
    rt = make_runtime("torch", BF16)
    logits = torch.randn(MAX_TOKENS, CFG.num_experts).bfloat16()
    got, expected = rt.route(logits), route_reference(logits, BF16)
    assert torch.equal(got.ids, expected.ids) and got.weights.dtype == torch.float32
    torch.testing.assert_close(got.weights, expected.weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plain", "interleaved"),
        ("interleaved", "transposed"),
        ("interleaved-transposed", "plain"),
        ("bias-float32", "interleaved"),
        ("plain", "bias-float32"),
    ],
)
def test_layers_of_another_storage_share(backend: str, one: str, other: str) -> None:
    """Plans are of the first layer's storage; what is computed is of each layer's own."""
    cfg = replace(CFG, dtype="float16", bias=True)
    first = make_runtime(backend, cfg, one)
    second = make_runtime(backend, cfg, other, seed=1, share=first)
    assert second._group is first._group
    for tokens in (1, 7):
        for rt in (first, second, first):
            check_call(rt, make_case(cfg, tokens))


def test_a_layer_that_does_not_fit_does_not_share() -> None:
    cfg = replace(CFG, bias=True)
    first = make_runtime("torch", cfg)
    weights = make_weights(cfg)
    for wrong, message in (
        (replace(weights, b2=None), "b2: missing"),
        (replace(weights, w2=weights.w2[:, :, ::2]), r"w2: shape \[5, 40, 12\]"),
        (ExpertWeights.random(replace(cfg, dtype="float16")), "w13: dtype torch.float16"),
    ):
        with pytest.raises(WeightsError, match=message):
            MoERuntime(cfg, wrong, share=first)
    assert len(first._group.members) == 1


def test_a_result_cannot_be_the_input_of_the_call_that_overwrites_it() -> None:
    rt = make_runtime("torch")
    case = make_case(CFG, 3)
    first = rt.forward(case.x, case.topk)
    second = rt.forward(first, case.topk)  # the next layer may read it
    kept = second.clone()
    with pytest.raises(InputError, match="out: overlaps x in memory"):
        rt.forward(first, case.topk)
    assert torch.equal(second, kept)
