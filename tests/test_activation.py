"""The activations: the reference against formulas, the CPU and Triton versions against it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moert.config import MoEConfig
from moert.steps.activation import activate_reference
from moert.steps.activation.inplace import activate_

CASES = [
    ("silu", True, None),
    ("silu", True, 1.5),  # the clamp that some families add to a plain activation
    ("silu", False, None),
    ("gelu", True, None),
    ("gelu", False, None),
    ("gelu_tanh", True, 2.0),
    ("gelu_tanh", False, None),
    ("relu2", True, None),
    ("relu2", False, None),
    ("swiglu_oai", True, None),
    ("swiglu_oai", True, 0.75),
]
# exp and x**3 overflow float32 in the extreme ones; NaN has to stay NaN
EXTREMES = [0.0, -0.0, 1e-30, -1e-3, 88.0, -89.0, 104.0, -104.0, 1e4, -1e4, 1e13, -1e13, math.nan]


def config(activation: str, gated: bool, limit: float | None) -> MoEConfig:
    return MoEConfig(2, 1, 8, 8, activation=activation, gated=gated, activation_limit=limit)


def inputs(rows: int = 9, width: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(rows, width, generator=generator) * 4 for _ in range(2))
    extremes = torch.tensor(EXTREMES)
    gate[0, : len(EXTREMES)] = extremes
    up[1, : len(EXTREMES)] = extremes
    return gate, up


def assert_same(got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """Equal up to rounding, of the result or of `scale`: 1 + erf(x) cancels where the result is small."""
    assert got.dtype == expected.dtype == torch.float32
    assert torch.equal(got.isnan(), expected.isnan())
    wrong = (got - expected).abs() > 2e-5 * expected.abs() + 3e-7 * scale.abs()
    assert not wrong.any(), (got[wrong], expected[wrong])


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu2", lambda x: F.relu(x).square()),
    ],
)
def test_reference_is_the_named_function(activation: str, expected: Any) -> None:
    gate, up = inputs()
    ungated = activate_reference(None, up, config(activation, False, None))
    assert_same(ungated, expected(up), up)
    gated = activate_reference(gate, up, config(activation, True, None))
    assert_same(gated, expected(gate) * up, gate * up)


def test_reference_swiglu_oai_by_hand() -> None:
    cfg = config("swiglu_oai", True, 7.0)
    gate = torch.tensor([0.5, 9.0, -9.0, 1.0])
    up = torch.tensor([0.25, 1.0, -8.0, 20.0])
    expected = [
        (u + 1) * g / (1 + math.exp(-1.702 * g))
        for g, u in [(0.5, 0.25), (7.0, 1.0), (-9.0, -7.0), (1.0, 7.0)]
    ]
    assert_same(activate_reference(gate, up, cfg), torch.tensor(expected), gate)


def test_reference_clamps_gate_from_above_only_and_up_on_both_sides() -> None:
    cfg = config("silu", True, 2.0)
    gate, up = torch.tensor([5.0, -5.0, 5.0]), torch.tensor([-3.0, 3.0, 1.0])
    expected = F.silu(torch.tensor([2.0, -5.0, 2.0])) * torch.tensor([-2.0, 2.0, 1.0])
    assert_same(activate_reference(gate, up, cfg), expected, gate)


def test_reference_computes_in_float32_and_leaves_its_inputs() -> None:
    gate, up = (t.bfloat16() for t in inputs())
    kept = gate.clone(), up.clone()
    cfg = config("silu", True, 1.0)
    out = activate_reference(gate, up, cfg)
    assert_same(out, activate_reference(gate.float(), up.float(), cfg), torch.zeros(()))
    for now, before in zip((gate, up), kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("into_up", [True, False])
def test_inplace_matches_reference(case: tuple[str, bool, float | None], into_up: bool) -> None:
    cfg = config(*case)
    gate, up = inputs()
    expected = activate_reference(gate if cfg.gated else None, up, cfg)
    scale = gate * up if cfg.gated else up
    pair = torch.stack((gate, up), dim=-1)  # alternating: neither is contiguous
    up = pair[..., 1]
    out = up if into_up else torch.full_like(gate, math.nan)
    spare = torch.full_like(gate, math.nan)
    alpha = torch.tensor(cfg.activation_alpha)
    activate_(pair[..., 0] if cfg.gated else None, up, spare, out, cfg, alpha)
    assert_same(out, expected, scale)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # meant: the quotient becomes 0
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_matches_reference(case: tuple[str, bool, float | None]) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no device and no interpreter")
    from activation_kernel import elementwise

    cfg = config(*case)
    gate, up = inputs()
    expected = activate_reference(gate if cfg.gated else None, up, cfg)
    out = torch.full_like(up, math.nan)
    out = elementwise(gate.to(device), up.to(device), out.to(device), cfg)
    assert_same(out.cpu(), expected, gate * up if cfg.gated else up)
