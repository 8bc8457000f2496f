"""quantization_config: what each of its forms means, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moert.checkpoint.hf_config import config_from_hf
from moert.checkpoint.packing import Packing, packing_of
from moert.config import Quant
from moert.errors import UnsupportedError

QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 96,
}


def gptq(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, **fields}


def weights(**fields: Any) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        **fields,
    }


def scheme(targets: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    return {"targets": targets or ["Linear"], "weights": weights(), **fields}


def compressed(*schemes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    groups = {f"group_{i}": each for i, each in enumerate(schemes)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        **fields,
    }


CT = "compressed-tensors"
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
KNOWN: list[tuple[str, dict[str, Any], Packing]] = [
    # stored zero points are one less in the first format, which is also that of files that do not say
    ("gptq", gptq(), Packing("gptq", Quant("int4", 128), 1)),
    ("gptq-v1", gptq(checkpoint_format="gptq"), Packing("gptq", Quant("int4", 128), 1)),
    ("gptq-v2", gptq(checkpoint_format="gptq_v2"), Packing("gptq", Quant("int4", 128), 0)),
    ("gptq-format", gptq(format="gptq_v2"), Packing("gptq", Quant("int4", 128), 0)),
    ("gptq-row", gptq(group_size=-1), Packing("gptq", Quant("int4", -1), 1)),
    (
        "gptq-order",
        gptq(sym=False, desc_act=True, group_size=32),
        Packing("gptq", Quant("int4", 32, symmetric=False), 1, act_order=True),
    ),
    (
        "gptq-default",
        {"quant_method": "gptq", "bits": 4},
        Packing("gptq", Quant("int4", 128), 1),
    ),
    (
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"},
        Packing("awq", Quant("int4", 64, symmetric=False)),
    ),
    (
        "awq-older",
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True},
        Packing("awq", Quant("int4", 32, symmetric=False)),
    ),
    ("ct", compressed(scheme()), Packing(CT, Quant("int4", 32))),
    (
        "ct-channel",
        compressed(scheme(weights=weights(strategy="channel", group_size=None))),
        Packing(CT, Quant("int4", -1)),
    ),
    (
        "ct-channel-inferred",
        compressed(scheme(weights={"num_bits": 4})),
        Packing(CT, Quant("int4", -1)),
    ),
    (
        "ct-order",
        compressed(scheme(weights=weights(actorder="group", symmetric=False))),
        Packing(CT, Quant("int4", 32, symmetric=False), act_order=True),
    ),
    # with a static order the columns of a group lie together
    (
        "ct-static",
        compressed(scheme(weights=weights(actorder="static"))),
        Packing(CT, Quant("int4", 32)),
    ),
    (
        "ct-format-of-the-group",
        compressed(scheme(format="pack-quantized"), format="mixed-precision"),
        Packing(CT, Quant("int4", 32)),
    ),
    # attention in fp8, experts in int4
    (
        "ct-experts-by-name",
        compressed(
            scheme(["re:.*self_attn.*"], weights=FP8, format="float-quantized"),
            scheme(["re:.*mlp.experts.*"], format="pack-quantized"),
            format="mixed-precision",
        ),
        Packing(CT, Quant("int4", 32)),
    ),
    (
        "ct-experts-among-linears",
        compressed(scheme(["Linear"]), scheme(["re:.*lm_head"], weights=weights(num_bits=8))),
        Packing(CT, Quant("int4", 32)),
    ),
]


@pytest.mark.parametrize(("given", "packing"), [c[1:] for c in KNOWN], ids=[c[0] for c in KNOWN])
def test_known(given: dict[str, Any], packing: Packing) -> None:
    for key in ("quantization_config", "compression_config"):
        assert packing_of({key: given}) == packing
    assert packing_of({"quantization_config": SimpleNamespace(**given)}) == packing
    assert config_from_hf({**QWEN, "quantization_config": given}).quant == packing.quant
    vision = {"model_type": "some_vl", "text_config": QWEN, "quantization_config": given}
    assert config_from_hf(vision).quant == packing.quant


UNSUPPORTED: list[tuple[str, Any, list[str]]] = [
    ("fp8", {"quant_method": "fp8", "fmt": "e4m3"}, ["'fp8'", "e4m3"]),
    ("name-only", "mxfp4", ["'mxfp4'"]),
    ("auto-round", {"quant_method": "auto-round", "bits": 4}, ["'auto-round'"]),
    ("3-bit", gptq(bits=3), ["'gptq'", "3 bits, need 4"]),
    ("8-bit", gptq(bits=8), ["8 bits, need 4"]),
    ("no-bits", {"quant_method": "gptq"}, ["None bits, need 4"]),
    ("odd-group", gptq(group_size=100), ["group_size=100", "multiple of 32"]),
    ("small-group", gptq(group_size=16), ["group_size=16", "multiple of 32"]),
    ("marlin", gptq(checkpoint_format="marlin"), ["'marlin'", "'gptq_v2'"]),
    ("is-marlin", gptq(is_marlin_format=True), ["packed for one kernel"]),
    ("awq-gemv", {"quant_method": "awq", "version": "gemv_fast"}, ["'gemv_fast'", "'gemm'"]),
    ("awq-8", {"quant_method": "awq", "bits": 8}, ["8 bits"]),
    ("awq-symmetric", {"quant_method": "awq", "zero_point": False}, ["zero_point=False"]),
    ("ct-empty", compressed(), ["no config_groups"]),
    ("ct-format", compressed(scheme(), format="int-quantized"), ["'int-quantized'"]),
    ("ct-8", compressed(scheme(weights=weights(num_bits=8))), ["8 bits, need 4"]),
    ("ct-fp4", compressed(scheme(weights=weights(type="float"))), ["type 'float'"]),
    ("ct-tensor", compressed(scheme(weights=weights(strategy="tensor"))), ["'tensor'"]),
    ("ct-group", compressed(scheme(weights=weights(group_size=48))), ["group_size=48"]),
    ("ct-w4a8", compressed(scheme(input_activations={"num_bits": 8})), ["input_activations"]),
    ("ct-sparse", compressed(scheme(), sparsity_config={"format": "bitmask"}), ["'bitmask'"]),
    (
        "ct-two",
        compressed(
            scheme(["re:.*gate_proj"]), scheme(["re:.*up_proj"], weights=weights(group_size=64))
        ),
        ["2 schemes", "need one"],
    ),
]


@pytest.mark.parametrize(
    ("given", "told"), [c[1:] for c in UNSUPPORTED], ids=[c[0] for c in UNSUPPORTED]
)
def test_unsupported(given: Any, told: list[str]) -> None:
    with pytest.raises(UnsupportedError) as error:
        config_from_hf({**QWEN, "quantization_config": given})
    for word in (*told, "quantization_config", "what can be loaded", "gptq, awq"):
        assert word in str(error.value)


def test_nothing_said() -> None:
    assert packing_of({}) is None and packing_of({"quantization_config": None}) is None
    assert config_from_hf(QWEN).quant is None


def test_a_packing_tells_what_it_is() -> None:
    packing = Packing("gptq", Quant("int4", 32, symmetric=False), 1, act_order=True)
    assert str(packing) == "gptq: int4, groups of 32, with zero points, act-order"
    assert str(Packing("awq", Quant("int4", -1))) == "awq: int4, one group a row, symmetric"
