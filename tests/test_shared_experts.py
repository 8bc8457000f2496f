"""Shared experts as experts of the routed ones' size: their parts add up to what the whole one computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import relative_error

from moert import ConfigError, ExpertWeights, MoEConfig, TopK, WeightsError
from moert.config import Routing
from moert.shared_experts import parts_of
from moert.steps.activation import activate_reference
from moert.steps.experts_reference import experts_reference, split_gate_up

E, K, H, I = 3, 2, 20, 8  # noqa: E741
CFG = MoEConfig(E, K, H, I, dtype="float32")


def config(**fields: Any) -> MoEConfig:
    return MoEConfig(E, K, H, I, dtype="float32", **fields)


# id, config, storage, S of the shared expert: a multiple of I, smaller than I, and neither
CASES: list[tuple[str, dict[str, Any], bool, int]] = [
    ("one", {}, False, I),
    ("three", {}, False, 3 * I),
    ("padded", {}, False, 2 * I + 3),
    ("smaller", {"activation": "gelu"}, False, 5),
    ("ungated", {"gated": False, "activation": "relu2"}, False, I + 1),
    ("interleaved", {}, True, 2 * I + 1),
    # swiglu_oai of a row of zeros is not zero by its gate alone
    ("bias", {"activation": "swiglu_oai", "bias": True}, True, I + 5),
]


@pytest.mark.parametrize(
    ("fields", "interleaved", "size"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_the_parts_add_up_to_the_shared_expert(
    fields: dict[str, Any], interleaved: bool, size: int
) -> None:
    cfg = config(**fields, shared_experts=parts_of(size, I))
    routed = ExpertWeights.random(config(**fields), seed=1)
    if interleaved:
        routed = ExpertWeights.from_tensors(
            routed.w13, routed.w2, routed.b13, routed.b2, interleaved=True
        )
    w13, w2 = torch.randn(cfg.w13_rows // I * size, H), torch.randn(H, size)
    weights = routed.append_shared(w13, w2)
    weights.check(cfg)
    x, rows = torch.randn(4, H), cfg.shared_experts
    shared = TopK(torch.ones(4, rows), torch.arange(E, E + rows, dtype=torch.int32).expand(4, rows))
    got = experts_reference(x, shared, weights, cfg.as_launched)
    gate, up = split_gate_up(x @ w13.T, cfg.gated, False)
    expected = activate_reference(gate, up, cfg) @ w2.T
    assert relative_error(got, expected) < 1e-5
    # the routed ones are what they were
    topk = TopK(torch.rand(4, K), torch.randint(0, E, (4, K)))
    assert torch.equal(
        experts_reference(x, topk, weights, cfg), experts_reference(x, topk, routed, cfg)
    )


def test_append_shared_keeps_the_gate() -> None:
    gate = torch.randn(1, H, dtype=torch.float64).half()
    weights = ExpertWeights.random(CFG).append_shared(
        torch.randn(2 * I, H), torch.randn(H, I), gate
    )
    weights.check(config(shared_experts=1, shared_gate=True))
    assert weights.shared_gate is not None and torch.equal(weights.shared_gate, gate)
    with pytest.raises(WeightsError, match="shared_gate"):
        weights.check(config(shared_experts=1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"w13": torch.zeros(2 * I, H + 1)}, ["shared w13", "[16, 21]", "[2S, H=20]"]),
        ({"w13": torch.zeros(2 * I + 1, H)}, ["shared w13", "[17, 20]"]),  # not of w2's S
        ({"w2": torch.zeros(H + 1, I)}, ["shared w2", "[21, 8]", "[H=20, S]"]),
        ({"w2": torch.zeros(I)}, ["shared w13"]),
        ({"w2": None}, ["shared w13"]),
        ({"w13": torch.zeros(0, H), "w2": torch.zeros(H, 0)}, ["S >= 1"]),
        ({"gate": torch.zeros(H)}, ["shared gate", "[20]", "[1, H=20]"]),
    ],
)
def test_append_shared_refuses(given: dict[str, Any], words: list[str]) -> None:
    good = {"w13": torch.zeros(2 * I, H), "w2": torch.zeros(H, I)}
    with pytest.raises(WeightsError) as error:
        ExpertWeights.random(CFG).append_shared(**{**good, **given})
    for word in words:
        assert word in str(error.value)


def test_append_shared_refuses_int4() -> None:
    weights = ExpertWeights.random(MoEConfig(2, 1, 64, 64)).quantize(group_size=32)
    with pytest.raises(WeightsError, match="int4; append shared experts first"):
        weights.append_shared(torch.zeros(128, 64), torch.zeros(64, 64))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shared_experts": -1}, ["shared_experts=-1", ">= 0"]),
        ({"shared_experts": 1.0}, ["shared_experts=1.0", "integer"]),
        ({"shared_experts": 126}, ["top_k=2", "shared_experts=126", "127"]),
        ({"shared_gate": True}, ["shared_gate=True", "shared_experts=0"]),
        ({"shared_experts": 1, "shared_gate": 1}, ["shared_gate=1", "True or False"]),
    ],
)
def test_refused_configs(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config(**fields)
    for word in words:
        assert word in str(error.value)


def test_the_config_and_what_is_launched() -> None:
    rule = Routing("sigmoid", num_groups=3, top_groups=2, group_score="max", correction_bias=True)
    cfg = config(shared_experts=2, shared_gate=True, routing=rule)
    assert eval(repr(cfg)) == cfg != config(routing=rule)
    launched = cfg.as_launched
    assert (launched.num_experts, launched.top_k) == (E + 2, K + 2)
    assert launched.as_launched is launched and CFG.as_launched is CFG


def test_random_weights_of_a_layer_with_shared_experts() -> None:
    cfg = config(
        shared_experts=2, shared_gate=True, bias=True, routing=Routing(correction_bias=True)
    )
    weights = ExpertWeights.random(cfg)
    weights.check(cfg)
    shapes = {name: tuple(t.shape) for name, t in weights.tensors().items()}
    assert shapes["w13"] == (E + 2, 2 * I, H) and shapes["b2"] == (E + 2, H)
    assert shapes["router_weight"] == (E, H) and shapes["shared_gate"] == (1, H)
    assert shapes["correction_bias"] == (E,)
    with pytest.raises(WeightsError, match="3 experts and shared_experts=1 behind them"):
        weights.check(replace(cfg, shared_experts=1))
