"""The activations without an allocation, for the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moert.config import MoEConfig


def activate_(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    spare: torch.Tensor,
    out: torch.Tensor,
    cfg: MoEConfig,
    alpha: torch.Tensor,
) -> None:
    """`out = activate_reference(gate, up, cfg)`; gate, up and spare are overwritten.

    Args:
        gate: [n, I] float32, any strides; None if the experts have no gate.
        up, spare, out: [n, I] float32, any strides, apart from each other; `out` may be `gate`
            or `up`.
        alpha: `cfg.activation_alpha` as a float32 tensor without dimensions: a Python number would become
            one at every call.
    """
    if gate is None:
        _act_(up, cfg.activation)
        out.copy_(up)
        return
    if cfg.activation_limit is not None:
        gate.clamp_(max=cfg.activation_limit)
        up.clamp_(min=-cfg.activation_limit, max=cfg.activation_limit)
    if cfg.activation == "swiglu_oai":
        torch.mul(gate, alpha, out=spare)
        gate.mul_(spare.sigmoid_())
        torch.addcmul(gate, gate, up, out=out)
        return
    _act_(gate, cfg.activation)
    torch.mul(gate, up, out=out)


def _act_(x: torch.Tensor, name: str) -> None:
    if name == "silu":
        F.silu(x, inplace=True)
    elif name == "relu2":
        x.relu_()
        x.mul_(x)
    else:
        torch.ops.aten.gelu_(x, approximate="tanh" if name == "gelu_tanh" else "none")
