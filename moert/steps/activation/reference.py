"""The activations as formulas, in float32; every other implementation is measured against these."""

from __future__ import annotations

import math

import torch

from moert.config import MoEConfig


def activate_reference(gate: torch.Tensor | None, up: torch.Tensor, cfg: MoEConfig) -> torch.Tensor:
    """The intermediate of an expert: `act(gate) * up`, or `act(up)` if the experts have no gate.

    swiglu_oai is `(up + 1) * gate * sigmoid(alpha * gate)` on clamped values, as published with
    gpt-oss (`swiglu` of its `torch/model.py`).

    Args:
        gate: [.., I], any float dtype; None if and only if `cfg.gated` is False.
        up: [.., I], same shape.
        cfg: names the activation. `activation_limit` clamps gate from above and up on both sides;
            experts without a gate are not clamped.

    Returns:
        [.., I] float32.
    """
    up = up.float()
    if not cfg.gated:
        return _act(up, cfg.activation)
    assert gate is not None
    gate = gate.float()
    if cfg.activation_limit is not None:
        gate = gate.clamp(max=cfg.activation_limit)
        up = up.clamp(min=-cfg.activation_limit, max=cfg.activation_limit)
    if cfg.activation == "swiglu_oai":
        return (up + 1) * gate * torch.sigmoid(cfg.activation_alpha * gate)
    return _act(gate, cfg.activation) * up


def _act(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        # erfc(-z) is 1 + erf(z) without the cancellation
        return 0.5 * x * torch.erfc(-x / math.sqrt(2))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert name == "relu2", name
    return torch.relu(x) ** 2
