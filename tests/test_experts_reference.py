"""The ground truth of the kernel tests: against transformers, and against its own definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import make_inputs, relative_error

from moert.config import MoEConfig
from moert.steps.activation import activate_reference
from moert.steps.experts_reference import experts_reference
from moert.topk import TopK
from moert.weights import ExpertWeights

CFG = MoEConfig(6, 3, 40, 24, dtype="float32")


def eager(module: Any, tensors: dict[str, torch.Tensor], x: torch.Tensor, topk: TopK) -> Any:
    module.config._experts_implementation = "eager"
    module.load_state_dict(tensors)
    with torch.no_grad():
        return module(x, topk.ids, topk.weights)


def test_matches_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(
        hidden_size=40, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3
    )
    weights = ExpertWeights.random(CFG)
    tensors = {"gate_up_proj": weights.w13, "down_proj": weights.w2}
    x, topk = make_inputs(CFG, 17)
    expected = eager(MixtralExperts(config), tensors, x, topk)
    assert relative_error(experts_reference(x, topk, weights, CFG), expected) < 1e-6


def test_matches_gpt_oss() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    cfg = replace(CFG, activation="swiglu_oai", bias=True)
    config = transformers.GptOssConfig(
        hidden_size=40, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3
    )
    weights = replace(ExpertWeights.random(cfg), interleaved=True)
    assert weights.b13 is not None and weights.b2 is not None
    tensors = {
        "gate_up_proj": weights.w13.transpose(1, 2),
        "gate_up_proj_bias": weights.b13,
        "down_proj": weights.w2.transpose(1, 2),
        "down_proj_bias": weights.b2,
    }
    x, topk = make_inputs(cfg, 17)
    x *= 10  # so that the clamps matter
    expected = eager(GptOssExperts(config), tensors, x, topk)
    assert relative_error(experts_reference(x, topk, weights, cfg), expected) < 1e-6


def test_one_token_by_hand_without_a_gate() -> None:
    cfg = replace(CFG, gated=False, activation="relu2", bias=True)
    weights = ExpertWeights.random(cfg)
    x, topk = make_inputs(cfg, 1)
    expected = torch.zeros(40, dtype=torch.float64)
    assert weights.b13 is not None and weights.b2 is not None
    for weight, e in zip(topk.weights[0].tolist(), topk.ids[0].tolist(), strict=True):
        h = weights.w13[e].double() @ x[0].double() + weights.b13[e]
        expected += weight * (weights.w2[e].double() @ h.relu().square() + weights.b2[e])
    assert relative_error(experts_reference(x, topk, weights, cfg)[0], expected) < 1e-6


def test_interleaved_weights_are_the_same_layer() -> None:
    cfg = replace(CFG, bias=True)
    weights = ExpertWeights.random(cfg)
    order = torch.arange(48).view(2, 24).t().reshape(-1)  # gate 0, up 0, gate 1, up 1, ..
    assert weights.b13 is not None
    other = replace(weights, w13=weights.w13[:, order], b13=weights.b13[:, order], interleaved=True)
    x, topk = make_inputs(cfg, 9)
    expected = experts_reference(x, topk, weights, cfg)
    assert relative_error(experts_reference(x, topk, other, cfg), expected) < 1e-6


@pytest.mark.parametrize("bad", [-1, 6, 2**30, 2**40, -(2**40)])
def test_ids_outside_contribute_zero(bad: int) -> None:
    weights = ExpertWeights.random(CFG)
    x, topk = make_inputs(CFG, 5)
    ids = topk.ids.clone()
    ids[2, 1] = bad
    ids[3] = bad
    kept = topk.weights.clone()
    kept[2, 1] = 0
    got = experts_reference(x, TopK(topk.weights, ids), weights, CFG)
    expected = experts_reference(x, TopK(kept, topk.ids), weights, CFG)
    expected[3] = 0
    assert not got[3].any()
    assert relative_error(got, expected) < 1e-6


def test_an_expert_named_twice_counts_twice() -> None:
    weights = ExpertWeights.random(CFG)
    x, _ = make_inputs(CFG, 1)
    twice = TopK(torch.tensor([[0.25, 0.5, 0.0]]), torch.tensor([[4, 4, 4]]))
    once = TopK(torch.tensor([[0.75, 0.0, 0.0]]), torch.tensor([[4, 0, 1]]))
    expected = experts_reference(x, once, weights, CFG)
    assert relative_error(experts_reference(x, twice, weights, CFG), expected) < 1e-6


def test_no_tokens_and_narrow_dtypes() -> None:
    cfg = replace(CFG, dtype="bfloat16")
    weights = ExpertWeights.random(cfg)
    x, topk = make_inputs(cfg, 4)
    wide = replace(weights, w13=weights.w13.float(), w2=weights.w2.float())
    x = x.bfloat16()
    got = experts_reference(x, topk, weights, cfg)
    assert got.dtype == torch.float32
    assert torch.equal(got, experts_reference(x.float(), topk, wide, CFG))
    nothing = TopK(topk.weights[:0], topk.ids[:0])
    assert experts_reference(x[:0], nothing, weights, cfg).shape == (0, 40)


def test_activation_sees_the_limit() -> None:
    cfg = replace(CFG, activation_limit=0.05)
    weights = ExpertWeights.random(cfg)
    x, _ = make_inputs(cfg, 1)
    topk = TopK(torch.tensor([[1.0, 0, 0]]), torch.tensor([[2, -1, -1]]))
    h = weights.w13[2] @ x[0]
    expected = weights.w2[2] @ activate_reference(h[:24], h[24:], cfg)
    assert relative_error(experts_reference(x, topk, weights, cfg)[0], expected) < 1e-5
