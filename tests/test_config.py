"""MoEConfig and Routing: what is refused, what is filled in, what comes back from repr."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from moert.config import MoEConfig, Quant, Routing
from moert.errors import ConfigError, MoertError

BASE: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
}


def config(**overrides: Any) -> MoEConfig:
    return MoEConfig(**{**BASE, **overrides})


REFUSED = [
    # id, overrides, words of the message
    ("top-k-zero", {"top_k": 0}, ["top_k=0", ">= 1"]),
    ("top-k-bool", {"top_k": True}, ["top_k=True"]),
    ("hidden-float", {"hidden_size": 64.0}, ["hidden_size=64.0", "integer"]),
    ("i-negative", {"intermediate_size": -1}, ["intermediate_size=-1"]),
    # the packed sort keeps the slot in 7 bits
    ("top-k-128", {"num_experts": 256, "top_k": 128}, ["top_k=128", "127"]),
    ("activation", {"activation": "relu"}, ["activation='relu'", "silu"]),
    ("dtype", {"dtype": "float64"}, ["dtype='float64'", "bfloat16"]),
    ("ungated-oai", {"activation": "swiglu_oai", "gated": False}, ["swiglu_oai", "gated=True"]),
    ("limit", {"activation_limit": 0.0}, ["activation_limit=0.0", "> 0"]),
    ("routing-type", {"routing": "softmax"}, ["routing='softmax'"]),
    ("routing-field", {"routing": {"score": "softmax"}}, ["routing", "score", "scoring"]),
    ("scoring", {"routing": {"scoring": "tanh"}}, ["scoring='tanh'", "sigmoid"]),
    ("group-score", {"routing": {"group_score": "mean"}}, ["group_score='mean'", "max"]),
    ("groups", {"routing": {"num_groups": 3}}, ["num_groups=3", "num_experts=8"]),
    (
        "top-groups",
        {"routing": {"num_groups": 2, "top_groups": 4}},
        ["top_groups=4", "num_groups=2"],
    ),
    # 1 group of 2 experts cannot give 3
    ("k-of-groups", {"top_k": 3, "routing": {"num_groups": 4}}, ["top_k=3", "2 experts"]),
    ("top2-of-1", {"top_k": 1, "routing": {"num_groups": 8}}, ["top2_sum", "at least 2"]),
    ("scale-nan", {"routing": {"scaling_factor": float("nan")}}, ["scaling_factor=nan"]),
    ("scale-zero", {"routing": {"scaling_factor": 0}}, ["scaling_factor=0", "> 0"]),
    ("scale-text", {"routing": {"scaling_factor": "2"}}, ["scaling_factor='2'", "number"]),
    ("scale-none", {"routing": {"scaling_factor": None}}, ["scaling_factor=None", "number"]),
    ("renormalize", {"routing": {"renormalize": "no"}}, ["renormalize='no'", "True or False"]),
    ("correction", {"routing": {"correction_bias": 1}}, ["correction_bias=1", "True or False"]),
    ("quant-type", {"quant": 4}, ["quant=4", "moert.Quant"]),
    ("quant-format", {"quant": "int3"}, ["quant.format='int3'", "int4"]),
    ("quant-field", {"quant": {"bits": 4}}, ["quant", "bits", "group_size"]),
    ("group-odd", {"quant": {"group_size": 100}}, ["quant.group_size=100", "multiple of 32"]),
    ("group-zero", {"quant": {"group_size": 0}}, ["quant.group_size=0"]),
    ("group-minus", {"quant": {"group_size": -32}}, ["quant.group_size=-32", "-1"]),
    ("group-float", {"quant": {"group_size": 32.0}}, ["quant.group_size=32.0"]),
    ("symmetric", {"quant": {"symmetric": 1}}, ["quant.symmetric=1", "True or False"]),
    ("gated", {"gated": "yes"}, ["gated='yes'", "True or False"]),
    ("bias", {"bias": 0}, ["bias=0", "True or False"]),
    ("limit-text", {"activation_limit": "7"}, ["activation_limit='7'", "number"]),
    ("limit-inf", {"activation_limit": float("inf")}, ["activation_limit=inf", "finite"]),
    ("limit-bool", {"activation_limit": True}, ["activation_limit=True", "number"]),
    ("alpha", {"activation_alpha": float("nan")}, ["activation_alpha=nan", "finite"]),
    ("alpha-text", {"activation_alpha": "1.7"}, ["activation_alpha='1.7'", "number"]),
    ("path", {"path": 3}, ["path=3", "directory"]),
]


@pytest.mark.parametrize(
    ("overrides", "words"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_refuses_with_field_value_and_bound(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config(**overrides)
    for word in words:
        assert word in str(error.value)
    assert isinstance(error.value, MoertError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dtype": torch.float16, "path": "/some/where"},
        {"activation": "swiglu_oai", "bias": True, "activation_alpha": 1.5},
        {"activation": "relu2", "gated": False},
        {"top_k": 8},
        {"top_k": 4, "routing": {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2}},
        {"routing": Routing(scoring="sqrtsoftplus", scaling_factor=2.5, correction_bias=True)},
        {"quant": Quant("int4", -1, symmetric=False)},
    ],
    ids=["plain", "dtype", "oai", "ungated", "all-experts", "groups", "scaled", "quant"],
)
def test_repr_round_trips(overrides: dict[str, Any]) -> None:
    cfg = config(**overrides)
    again = eval(repr(cfg))
    assert again == cfg and again.path == cfg.path and hash(again) == hash(cfg)
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_equality_sees_every_field_but_path() -> None:
    assert config() == config(path="elsewhere")
    for name, other in (
        ("top_k", 3),
        ("dtype", "float16"),
        ("bias", True),
        ("activation", "gelu"),
        ("activation_limit", 5.0),
        ("routing", Routing(renormalize=False)),
        ("quant", Quant()),
    ):
        assert config() != config(**{name: other}), name


def test_derived_values() -> None:
    assert config().torch_dtype is torch.bfloat16
    assert config(dtype=torch.float32).dtype == "float32"
    assert config().w13_rows == 192
    assert config(gated=False, activation="relu2").w13_rows == 96
    assert config(activation="swiglu_oai").activation_limit == 7.0
    assert config(activation="swiglu_oai", activation_limit=3.0).activation_limit == 3.0
    assert config().activation_limit is None
    assert config(quant="int4").quant == Quant("int4", 128, symmetric=True)
    assert config(quant={"group_size": 96}).quant == Quant(group_size=96)
    assert config(quant=Quant()) != config(quant=Quant(group_size=64))


def test_numbers_and_paths_have_one_form() -> None:
    cfg = config(activation_limit=7, activation_alpha=2, path=Path("some/where"))
    assert repr(cfg) == repr(config(activation_limit=7.0, activation_alpha=2.0, path="some/where"))
    assert repr(Routing(scaling_factor=2)) == repr(Routing(scaling_factor=2.0))


def test_from_dict_takes_own_names_only() -> None:
    assert (
        MoEConfig.from_dict({**BASE, "routing": {"scoring": "sigmoid"}}).routing.scoring
        == "sigmoid"
    )
    with pytest.raises(ConfigError, match=r"moe_intermediate_size.*intermediate_size"):
        MoEConfig.from_dict({**BASE, "moe_intermediate_size": 1})
    with pytest.raises(ConfigError, match="top_k"):
        MoEConfig.from_dict({name: value for name, value in BASE.items() if name != "top_k"})


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        config().top_k = 3  # type: ignore[misc]


def test_a_shard_may_have_fewer_experts_than_a_token_takes() -> None:
    """Those of the others are ids out of range; a whole layer, as a checkpoint has it, needs K of them."""
    shard = config(top_k=9)
    assert not shard.can_route and eval(repr(shard)) == shard
    assert config(top_k=8).can_route
    config(top_k=8).check_routing()
    with pytest.raises(ConfigError, match="top_k=9 exceeds num_experts=8"):
        shard.check_routing()
