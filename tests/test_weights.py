"""ExpertWeights: views instead of copies, every mismatch named, random layers of sane size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moert import random_weights
from moert.config import MoEConfig, Routing
from moert.errors import WeightsError
from moert.weights import ExpertWeights

E, K, H, I = 5, 2, 24, 40  # noqa: E741  # nothing equals anything else, 2I included
PLAIN = MoEConfig(E, K, H, I, dtype="float32")
BIASED = MoEConfig(E, K, H, I, dtype="float32", activation="swiglu_oai", bias=True)
SIGMOID = MoEConfig(E, K, H, I, dtype="float32", routing=Routing("sigmoid", correction_bias=True))


def test_from_tensors_makes_views() -> None:
    w13, w2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    made = ExpertWeights.from_tensors(w13, w2)
    made.check(PLAIN)
    assert made.w13.data_ptr() == w13.data_ptr() and made.w2.data_ptr() == w2.data_ptr()
    turned13, turned2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    made = ExpertWeights.from_tensors(turned13, turned2, transposed=True)
    made.check(PLAIN)
    assert made.w13.data_ptr() == turned13.data_ptr() and made.w13.stride(1) == 1
    assert torch.equal(made.w13, w13) and torch.equal(made.w2, w2)


def test_from_tensors_detaches_parameters() -> None:
    w13 = torch.nn.Parameter(torch.randn(E, 2 * I, H))
    made = ExpertWeights.from_tensors(w13, torch.randn(E, H, I))
    assert not made.w13.requires_grad and made.w13.data_ptr() == w13.data_ptr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"w13": None}, ["w13", "NoneType"]),
        ({"w2": [1]}, ["w2", "list", "torch.Tensor"]),
        ({"b2": 0.5}, ["b2", "float"]),
        ({"w13": torch.zeros(2 * I, H)}, ["w13", "[80, 24]", "3 dimensions"]),
    ],
)
def test_from_tensors_refuses(arguments: dict[str, Any], words: list[str]) -> None:
    good = {"w13": torch.zeros(E, 2 * I, H), "w2": torch.zeros(E, H, I)}
    with pytest.raises(WeightsError) as error:
        ExpertWeights.from_tensors(**{**good, **arguments})
    for word in words:
        assert word in str(error.value)


def zeros(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(*shape, **kwargs)


MISFITS: list[tuple[str, MoEConfig, dict[str, Any], list[str]]] = [
    # id, config, tensors that differ from a fitting set, words of the message
    ("w13-shape", PLAIN, {"w13": zeros(E, H, 2 * I)}, ["w13", "[5, 24, 80]", "[5, 80, 24]"]),
    ("w13-rows", PLAIN, {"w13": zeros(E, I, H)}, ["w13", "[5, 40, 24]", "[5, 80, 24]"]),
    ("w2-experts", PLAIN, {"w2": zeros(E + 1, H, I)}, ["w2", "[6, 24, 40]", "[5, 24, 40]"]),
    ("w2-dtype", PLAIN, {"w2": zeros(E, H, I).half()}, ["w2", "float16", "float32"]),
    ("w13-dtype", PLAIN, {"w13": zeros(E, 2 * I, H).bfloat16()}, ["w13", "bfloat16", "float32"]),
    ("b13-missing", BIASED, {"b13": None}, ["b13", "missing", "[5, 80]"]),
    ("b2-missing", BIASED, {"b2": None}, ["b2", "missing", "[5, 24]"]),
    ("b13-shape", BIASED, {"b13": zeros(E, I)}, ["b13", "[5, 40]", "[5, 80]"]),
    ("b2-dtype", BIASED, {"b2": zeros(E, H).half()}, ["b2", "float16", "float32"]),
    ("b2-unwanted", PLAIN, {"b2": zeros(E, H)}, ["b2", "bias=False"]),
    ("correction-unwanted", PLAIN, {"correction_bias": zeros(E)}, ["correction_bias", "False"]),
    (
        "correction-shape",
        SIGMOID,
        {"correction_bias": zeros(E + 1)},
        ["correction_bias", "[6]", "[5]"],
    ),
    (
        "correction-dtype",
        SIGMOID,
        {"correction_bias": zeros(E).bfloat16()},
        ["correction_bias", "bfloat16", "float32"],
    ),
    (
        "router-shape",
        PLAIN,
        {"router_weight": zeros(H, E)},
        ["router_weight", "[24, 5]", "[5, 24]"],
    ),
    ("router-dtype", PLAIN, {"router_weight": zeros(E, H).int()}, ["router_weight", "int32"]),
    ("router-bias", PLAIN, {"router_bias": zeros(1)}, ["router_bias", "[1]", "[5]"]),
    ("device", PLAIN, {"w2": zeros(E, H, I, device="meta")}, ["w2", "meta", "cpu"]),
    # every second element of a wider matrix: neither dimension can be read in wide loads
    (
        "strides",
        PLAIN,
        {"w13": zeros(E, 2 * I, 2 * H)[..., ::2]},
        ["w13", "strides", "[3840, 48, 2]"],
    ),
]


def fitting(cfg: MoEConfig) -> dict[str, Any]:
    return ExpertWeights.random(cfg).tensors()


@pytest.mark.parametrize(
    ("cfg", "differing", "words"), [c[1:] for c in MISFITS], ids=[c[0] for c in MISFITS]
)
def test_check_names_what_does_not_fit(
    cfg: MoEConfig, differing: dict[str, Any], words: list[str]
) -> None:
    good = fitting(cfg)
    ExpertWeights(**good).check(cfg)
    with pytest.raises(WeightsError) as error:
        ExpertWeights(**{**good, **differing}).check(cfg)
    for word in words:
        assert word in str(error.value)


def test_check_allows() -> None:
    good = fitting(SIGMOID)
    del good["correction_bias"], good["router_weight"]
    ExpertWeights(**good).check(SIGMOID)
    # padded rows and experts, biases in float32 beside 16-bit weights, an alternating order
    wide = torch.zeros(E, 2 * I + 3, H + 8)[:, : 2 * I, :H]
    ExpertWeights(w13=wide, w2=good["w2"]).check(PLAIN)
    half = MoEConfig(E, K, H, I, dtype="float16", bias=True)
    biases = {
        name: tensor.float() for name, tensor in fitting(half).items() if name in ("b13", "b2")
    }
    ExpertWeights(**{**fitting(half), **biases}, interleaved=True).check(half)


def test_ungated_has_half_the_rows() -> None:
    cfg = MoEConfig(E, K, H, I, activation="relu2", gated=False)
    made = ExpertWeights.random(cfg)
    assert made.w13.shape == (E, I, H)
    made.check(cfg)
    with pytest.raises(WeightsError, match=r"interleaved.*gated=False"):
        ExpertWeights(w13=made.w13, w2=made.w2, interleaved=True).check(cfg)


def test_size_device_and_tensors() -> None:
    made = ExpertWeights.random(BIASED)
    assert set(made.tensors()) == {"w13", "w2", "b13", "b2", "router_weight", "router_bias"}
    assert made.nbytes == 4 * (E * 3 * I * H + E * 2 * I + E * H + E * H + E)
    assert made.device == torch.device("cpu") and made.dtype is torch.float32
    assert "correction_bias" in ExpertWeights.random(SIGMOID).tensors()
    with pytest.raises(AttributeError):
        made.w13 = made.w2  # type: ignore[misc]


@pytest.mark.parametrize("small", [True, False], ids=["on-cpu", "on-device"])
def test_random_is_its_seed(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    if not small:
        monkeypatch.setattr(random_weights, "SAME_EVERYWHERE", 0)
    first, again = ExpertWeights.random(BIASED, seed=3), ExpertWeights.random(BIASED, seed=3)
    other = ExpertWeights.random(BIASED, seed=4)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
        assert not torch.equal(tensor, other.tensors()[name]), name
        assert tensor.std() > 0, name
    assert not torch.equal(first.w13[0], first.w13[1])


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_oai"])
@pytest.mark.parametrize("top_k", [1, 8])
def test_random_gives_outputs_of_unit_order(activation: str, top_k: int) -> None:
    cfg = MoEConfig(8, top_k, 96, 128, activation=activation, dtype="float32")
    made = ExpertWeights.random(cfg)
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    gate, up = torch.einsum("th,enh->etn", x, made.w13).chunk(2, -1)
    act = {
        "silu": lambda: torch.nn.functional.silu(gate) * up,
        "gelu": lambda: torch.nn.functional.gelu(gate) * up,
        "swiglu_oai": lambda: gate * torch.sigmoid(1.702 * gate) * (up + 1),
    }[activation]()
    out = torch.einsum("eti,ehi->eth", act, made.w2)[:top_k].mean(0)
    assert 0.3 < out.std() < 3


@pytest.mark.gpu
def test_random_on_a_gpu() -> None:
    small = ExpertWeights.random(PLAIN, device="cuda")
    for name, tensor in ExpertWeights.random(PLAIN).tensors().items():
        assert torch.equal(small.tensors()[name].cpu(), tensor), name
    big = ExpertWeights.random(MoEConfig(32, 4, 1024, 512), device="cuda")
    assert big.device.type == "cuda" and big.w13.float().std() > 0
