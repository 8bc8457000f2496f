"""How AITER is found, why it is not, and that its stand-in has its signatures."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import aiter_stand_in
import pytest
import torch
from aiter_cases import CFG, MI300, make
from aiter_stand_in import StandIn

from moert import UnsupportedError
from moert.backends.aiter import AiterBackend
from moert.backends.aiter_ops import find_aiter
from moert.backends.aiter_sequences import SEQUENCES, Plain
from moert.cli.info import backends
from moert.device import KNOWN_DEVICES

# what the wheel lacks: aiter/ops/moe_sorting_opus.py at github.com/ROCm/aiter e4048607
OPUS = {
    "moe_sorting_opus_get_workspace_size": "tokens num_experts topk dispatch_policy=0",
    "moe_sorting_opus_fwd": (
        "topk_ids topk_weights sorted_token_ids sorted_weights sorted_expert_ids num_valid_ids moe_buf "
        "num_experts unit_size local_expert_mask=None num_local_tokens=None workspace=None "
        "dispatch_policy=0 local_topk_ids=None m_indices=None reverse_sorted=None"
    ),
}


class Falling(ModuleType):
    """A package whose import fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__("aiter")
        self.error = error

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "aiter":
            raise self.error


UNRELATED = ModuleType("aiter")
UNRELATED.__file__ = "/site/aiter/__init__.py"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ModuleNotFoundError("No module named 'aiter'", name="aiter"),
            "aiter is not installed (the",
        ),
        (
            ModuleNotFoundError("No module named 'packaging'", name="packaging"),
            "does not import: ModuleNotFoundError: No module named 'packaging'",
        ),
        (
            RuntimeError("Get GPU arch from rocminfo failed\nmore"),
            "RuntimeError: Get GPU arch from rocminfo failed",
        ),
        (AttributeError("no _cuda_getArchFlags"), "AttributeError: no _cuda_getArchFlags"),
        (OSError(), "does not import: OSError"),
    ],
    ids=["absent", "undeclared", "no-device", "no-compiler", "wordless"],
)
def test_an_import_that_fails_is_a_reason(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Falling(error), *sys.meta_path])
    found = find_aiter(Plain.operators, hip="7.0")
    assert isinstance(found, str) and reason in found and "\n" not in found


def test_without_rocm_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Falling(AssertionError("imported")), *sys.meta_path])
    assert find_aiter(Plain.operators, hip=None) == "this torch is built without ROCm"


def test_the_unrelated_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", UNRELATED)
    found = find_aiter(Plain.operators, hip="7.0")
    assert found == (
        "the package named aiter (/site/aiter/__init__.py) is not AMD's: it has no operators of experts"
    )


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("ck_moe_stage1_fwd", None),
        ("ck_moe_stage2_fwd", "block_m"),
        ("moe_sorting_fwd", "dispatch_policy"),
    ],
)
def test_a_missing_operator_or_parameter_is_named(
    name: str, parameter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = StandIn(opus=False).install(monkeypatch)
    if parameter is None:
        delattr(package, name)
        assert find_aiter(Plain.operators) == f"this aiter has no {name}"
        return
    signature = inspect.signature(getattr(aiter_stand_in, name))
    kept = [p for p in signature.parameters.values() if p.name != parameter]
    monkeypatch.setattr(package, name, lambda: None)
    getattr(package, name).__signature__ = signature.replace(parameters=kept)
    assert find_aiter(Plain.operators) == f"{name} of this aiter takes no {parameter}"


def test_the_better_sort_is_taken_by_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    package = StandIn().install(monkeypatch)
    found = find_aiter(Plain.operators)
    assert not isinstance(found, str) and found.sort_name == "moe_sorting_opus_fwd"
    # an early one has no parameter for the scratch
    monkeypatch.setattr(package, "moe_sorting_opus_fwd", aiter_stand_in.moe_sorting_fwd)
    found = find_aiter(Plain.operators)
    assert not isinstance(found, str) and found.sort_name == "moe_sorting_fwd"


def test_compiled_operators_tell_by_their_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    package = StandIn().install(monkeypatch)
    assert list(inspect.signature(package.moe_sorting_opus_fwd).parameters) == ["args", "options"]
    # as the older sort under the newer name would: its schema has no workspace
    monkeypatch.setattr(torch.ops.aiter, "moe_sorting_opus_fwd", torch.ops.aiter.moe_sorting_fwd)
    found = find_aiter(Plain.operators)
    assert not isinstance(found, str) and found.sort_name == "moe_sorting_fwd"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": True}, "experts with biases"),
        ({"gated": False}, "experts without a gate"),
        ({"activation": "gelu_tanh"}, "activation='gelu_tanh' is not one of silu, gelu"),
        ({"activation_limit": 7.0}, "activation_limit=7.0"),
        ({"hidden_size": 192}, "multiples of 128, got H=192"),
        ({"intermediate_size": 64, "hidden_size": 64}, "got H=64, I=64"),
        ({"dtype": "float32"}, "dtype='float32' is not one of bfloat16, float16"),
    ],
    ids=str,
)
def test_layers_it_cannot_compute(aiter: StandIn, change: dict[str, Any], reason: str) -> None:
    assert reason in (AiterBackend.supports(replace(CFG, **change), MI300) or "")
    assert AiterBackend.supports(CFG, MI300) is None


@pytest.mark.parametrize(
    ("arch", "reason"),
    [("sm_90", "is for ROCm"), ("gfx1151", "for CDNA devices, AMD Radeon 8060S")],
)
def test_devices_it_is_not_for(aiter: StandIn, arch: str, reason: str) -> None:
    assert reason in (AiterBackend.supports(CFG, KNOWN_DEVICES[arch]) or "")


def test_the_reason_is_told(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", UNRELATED)
    reason = AiterBackend.supports(CFG, MI300)
    assert reason is not None and "is not AMD's" in reason
    with pytest.raises(
        UnsupportedError, match=r"backend aiter: the package named aiter .* is not AMD's"
    ):
        make()


class Broken(ModuleType):
    """AMD's, whose operators cannot be looked at."""

    def __getattr__(self, name: str) -> Any:
        if name in ("fused_moe", "ck_moe_stage1_fwd"):
            raise RuntimeError("hipcc: not found")
        raise AttributeError(name)


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "aiter is not installed (the package is named amd-aiter)"),
        (UNRELATED, "is not AMD's: it has no operators of experts"),
        (Broken("aiter"), "aiter is installed, but cannot be used: RuntimeError: hipcc: not found"),
    ],
    ids=["missing", "unrelated", "broken"],
)
def test_info_tells_the_reason(
    package: ModuleType | None, reason: str, aiter: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(facts: Any) -> str | None:
        return {r["backend"]: r["why_not"] for r in backends(facts)}["aiter"]

    assert row(MI300) is None
    if package is None:
        error = ModuleNotFoundError("No module named 'aiter'", name="aiter")
        monkeypatch.delitem(sys.modules, "aiter")
        monkeypatch.setattr(sys, "meta_path", [Falling(error), *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "aiter", package)
    assert reason in (row(MI300) or "")


def test_the_stand_in_has_the_signatures_of_the_wheel() -> None:
    recorded = json.loads((Path(__file__).parent / "aiter_signatures.json").read_text())[
        "operators"
    ]
    # test_aiter_router has the table for this one
    assert recorded.pop("_topk_softmax") is None
    for name, wanted in recorded.items():
        if wanted is None:
            continue
        parameters = inspect.signature(getattr(aiter_stand_in, name)).parameters.values()
        empty = inspect.Parameter.empty
        got = [[p.name, None if p.default is empty else _source(p.default)] for p in parameters]
        assert got == wanted, name
    assert {name for name, wanted in recorded.items() if wanted is None} == set(OPUS)


def _source(default: Any) -> str:
    return str(default) if hasattr(default, "name") else repr(default)


@pytest.mark.parametrize("name", OPUS)
def test_the_stand_in_has_the_signatures_that_the_wheel_lacks(name: str) -> None:
    parameters = inspect.signature(getattr(aiter_stand_in, name)).parameters.values()
    empty = inspect.Parameter.empty
    got = [p.name if p.default is empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(got) == OPUS[name]


def test_shuffled_blocks_hold_16_bytes_of_each_of_16_rows() -> None:
    n, k = 32, 64
    shuffled = aiter_stand_in.shuffle_weight(torch.arange(n * k).to(torch.float16).view(n, k))
    # element (row 1, column 8) of the second column block of the second row block
    place = (((1 * 2 + 1) * 4 + 1) * 16 + 1) * 8
    assert shuffled.flatten()[place] == torch.tensor((16 + 1) * k + 32 + 8).to(torch.float16)


def test_every_sequence_names_what_it_calls() -> None:
    for sequence in SEQUENCES.values():
        for name, parameters in sequence.operators.items():
            signature = inspect.signature(getattr(aiter_stand_in, name))
            assert set(parameters) <= set(signature.parameters)
