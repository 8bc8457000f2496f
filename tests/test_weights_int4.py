"""ExpertWeights with int4 matrices: made, moved, checked, updated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import make_inputs, relative_error

import moert.random_weights as random_weights
from moert.config import MoEConfig, Quant
from moert.errors import ConfigError, WeightsError
from moert.quantization.int4_layout import Int4Matrix, dequantize
from moert.steps.experts_reference import experts_reference
from moert.weights import ExpertWeights

E, K, H, I = 5, 2, 72, 40  # noqa: E741
CFG = MoEConfig(E, K, H, I, dtype="float32", quant=Quant("int4", 32))
BIASED = replace(CFG, bias=True)
ASYMMETRIC = replace(CFG, quant=Quant("int4", 64, symmetric=False))


def dequantized(weights: ExpertWeights) -> ExpertWeights:
    assert isinstance(weights.w13, Int4Matrix) and isinstance(weights.w2, Int4Matrix)
    return replace(weights, w13=dequantize(weights.w13), w2=dequantize(weights.w2))


@pytest.mark.parametrize(
    ("gated", "interleaved"),
    [(True, False), (True, True), (False, False)],
    ids=["gated", "interleaved", "ungated"],
)
def test_quantize_keeps_the_layer(gated: bool, interleaved: bool) -> None:
    cfg = MoEConfig(E, K, H, I, dtype="float32", bias=True, gated=gated)
    before = replace(ExpertWeights.random(cfg), interleaved=interleaved)
    after = before.quantize("int4", group_size=32)
    assert after.quant == Quant("int4", 32) and not after.interleaved
    after.check(replace(cfg, quant=after.quant))
    assert isinstance(after.w13, Int4Matrix) and after.w13.paired == gated
    x, topk = make_inputs(cfg, 6)
    wanted = experts_reference(x, topk, before, cfg)
    # rounding costs a tenth; a gate taken for an up, or a bias out of order, costs everything
    assert relative_error(experts_reference(x, topk, after, cfg), wanted) < 0.25
    exact = experts_reference(x, topk, dequantized(after), cfg)
    assert relative_error(experts_reference(x, topk, after, cfg), exact) < 1e-6
    assert after.b2 is before.b2 and after.router_weight is before.router_weight


@pytest.mark.parametrize("cfg", [CFG, ASYMMETRIC, BIASED], ids=["symmetric", "asymmetric", "bias"])
def test_random_rounds_the_floating_ones(cfg: MoEConfig) -> None:
    assert cfg.quant is not None
    made = ExpertWeights.random(cfg, seed=2)
    made.check(cfg)
    assert made.quant == cfg.quant and made.dtype is torch.float32
    floating = ExpertWeights.random(replace(cfg, quant=None), seed=2)
    again = floating.quantize(group_size=cfg.quant.group_size, symmetric=cfg.quant.symmetric)
    for name, tensor in made.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_a_large_layer_is_drawn_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SAME_EVERYWHERE", 0)
    first, again = ExpertWeights.random(BIASED, seed=3), ExpertWeights.random(BIASED, seed=3)
    first.check(BIASED)
    assert isinstance(first.w13, Int4Matrix) and isinstance(again.w13, Int4Matrix)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert not torch.equal(first.w13.codes[0], first.w13.codes[1])
    assert 0.8 < float(dequantize(first.w13).std()) * H**0.5 < 1.2


def test_size_device_and_tensors() -> None:
    made = ExpertWeights.random(replace(BIASED, quant=ASYMMETRIC.quant))
    matrices = {f"{m}.{part}" for m in ("w13", "w2") for part in ("codes", "scales", "zeros")}
    assert set(made.tensors()) == {*matrices, "b13", "b2", "router_weight", "router_bias"}
    assert isinstance(made.w13, Int4Matrix) and isinstance(made.w2, Int4Matrix)
    assert made.w13.shape == (E, 2 * I, H) and made.w2.shape == (E, H, I)
    rest = sum(t.numel() * 4 for n, t in made.tensors().items() if "." not in n)
    assert made.nbytes == made.w13.nbytes + made.w2.nbytes + rest
    moved = made.to("meta")
    assert moved.device.type == "meta" and moved.quant == made.quant
    assert all(tensor.is_meta for tensor in moved.tensors().values())
    assert made.to("cpu").tensors()["w2.codes"] is made.w2.codes
    assert ExpertWeights.random(replace(CFG, quant=None)).quant is None


@pytest.mark.parametrize("cfg", [CFG, ASYMMETRIC, BIASED], ids=["symmetric", "asymmetric", "bias"])
def test_the_exchange_layout_loses_nothing(cfg: MoEConfig) -> None:
    made = ExpertWeights.random(cfg)
    w13, w2 = made.to_skinny_int4()
    assert w13.codes.shape == (E, 2 * I, H // 8) and w2.codes.shape == (E, H, I // 8)
    others = {n: t for n, t in made.tensors().items() if "." not in n}
    again = ExpertWeights.from_skinny_int4(w13, w2, **others)
    again.check(cfg)
    for name, tensor in made.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_an_update_takes_the_same_layout_only() -> None:
    made, new = ExpertWeights.random(CFG, seed=0), ExpertWeights.random(CFG, seed=1)
    assert isinstance(made.w13, Int4Matrix) and isinstance(new.w13, Int4Matrix)
    address, old_w2 = made.w13.codes.data_ptr(), dequantize(made.w2)  # type: ignore[arg-type]
    made.copy_({"w13": new.w13, "router_weight": new.router_weight})  # type: ignore[dict-item]
    assert made.w13.codes.data_ptr() == address
    assert torch.equal(dequantize(made.w13), dequantize(new.w13))
    assert torch.equal(dequantize(made.w2), old_w2)  # type: ignore[arg-type]
    before = dequantize(made.w13)
    other_group = ExpertWeights.random(replace(CFG, quant=Quant("int4", 64))).w13
    zeros = ExpertWeights.random(replace(CFG, quant=Quant("int4", 32, False))).w13
    for value, words in (
        (torch.zeros(E, 2 * I, H), ["w13", "Tensor", "does not round", "quantize"]),
        (made.w2, ["w13", "columns", "paired", "rows"]),
        (other_group, ["w13", "group_size", "scales"]),
        (zeros, ["w13", "zeros"]),
    ):
        with pytest.raises(WeightsError) as error:
            made.copy_({"router_weight": torch.zeros(E, H), "w13": value})
        for word in words:
            assert word in str(error.value)
    assert torch.equal(dequantize(made.w13), before) and made.router_weight is not None
    assert made.router_weight.any()
    with pytest.raises(WeightsError, match=r"w13: got Int4Matrix, need \[5, 80, 72\]"):
        ExpertWeights.random(replace(CFG, quant=None)).copy_({"w13": made.w13})


def changed(weights: ExpertWeights, name: str, **fields: Any) -> ExpertWeights:
    return replace(weights, **{name: replace(getattr(weights, name), **fields)})


GOOD = ExpertWeights.random(CFG)
MISFITS: list[tuple[str, MoEConfig, ExpertWeights, list[str]]] = [
    ("no-quant", replace(CFG, quant=None), GOOD, ["w13", "int4", "quant=None"]),
    (
        "floating",
        CFG,
        ExpertWeights.random(replace(CFG, quant=None)),
        ["w13", "not quantised", "quantize"],
    ),
    ("w2-floating", CFG, replace(GOOD, w2=torch.zeros(E, H, I)), ["w2", "not quantised"]),
    ("group", replace(CFG, quant=Quant("int4", 64)), GOOD, ["w13", "groups of 32", "need 64"]),
    ("zeros", replace(CFG, quant=Quant("int4", 32, False)), GOOD, ["w13", "no zero points"]),
    (
        "no-zeros",
        replace(CFG, quant=Quant("int4", 64)),
        ExpertWeights.random(ASYMMETRIC),
        ["w13", "has zero points"],
    ),
    ("dtype", replace(CFG, dtype="bfloat16"), GOOD, ["w13", "float32", "bfloat16"]),
    ("shape", replace(CFG, hidden_size=80), GOOD, ["w13", "[5, 80, 72]", "[5, 80, 80]"]),
    ("unpaired", CFG, changed(GOOD, "w13", paired=False), ["w13", "paired=False"]),
    ("paired", CFG, changed(GOOD, "w2", paired=True), ["w2", "paired=True"]),
    ("interleaved", CFG, replace(GOOD, interleaved=True), ["interleaved", "gate rows before"]),
    (
        "w2-permuted",
        CFG,
        changed(GOOD, "w2", permutation=torch.zeros(E, I, dtype=torch.int32)),
        ["w2", "permutation"],
    ),
    (
        "strides",
        CFG,
        changed(
            GOOD,
            "w2",
            codes=GOOD.tensors()["w2.codes"].transpose(3, 4).contiguous().transpose(3, 4),
        ),
        ["w2.codes", "strides", "contiguous"],
    ),
]


@pytest.mark.parametrize(
    ("cfg", "weights", "words"), [c[1:] for c in MISFITS], ids=[c[0] for c in MISFITS]
)
def test_check_names_what_does_not_fit(
    cfg: MoEConfig, weights: ExpertWeights, words: list[str]
) -> None:
    GOOD.check(CFG)
    with pytest.raises(WeightsError) as error:
        weights.check(cfg)
    for word in words:
        assert word in str(error.value)


def test_one_group_a_row_is_the_same_whatever_its_name() -> None:
    """K=72 is one group of 128 columns, and so it is per channel."""
    per_channel = replace(CFG, intermediate_size=72, quant=Quant("int4", -1))
    made = ExpertWeights.random(per_channel)
    made.check(per_channel)
    made.check(replace(per_channel, quant=Quant("int4", 128)))
    assert made.quant == Quant("int4", -1)


def test_refusals_of_quantize() -> None:
    floating = ExpertWeights.random(replace(CFG, quant=None))
    with pytest.raises(WeightsError, match="w13: int4 already"):
        GOOD.quantize()
    with pytest.raises(ConfigError, match="format='int3'"):
        floating.quantize("int3")
    with pytest.raises(ConfigError, match="group_size=100"):
        floating.quantize(group_size=100)
    with pytest.raises(WeightsError, match="w13: not int4"):
        floating.to_skinny_int4()
    with pytest.raises(WeightsError, match="w2: got Tensor, need a SkinnyInt4"):
        ExpertWeights.from_skinny_int4(GOOD.to_skinny_int4()[0], torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"w13: 80 rows, need I=30"):
        replace(floating, w2=torch.zeros(E, H, 30)).quantize()
