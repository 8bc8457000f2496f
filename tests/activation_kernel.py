"""An elementwise kernel around `activate`, for test_activation."""

import torch
import triton
import triton.language as tl

from moert.config import MoEConfig
from moert.steps.activation.triton import activate


@triton.jit
def _elementwise_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    numel,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    gate = tl.load(gate_ptr + offset, mask=mask, other=0.0)
    up = tl.load(up_ptr + offset, mask=mask, other=0.0)
    out = activate(gate, up, ACTIVATION, GATED, LIMIT, ALPHA)
    tl.store(out_ptr + offset, out, mask=mask)


def elementwise(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, cfg: MoEConfig
) -> torch.Tensor:
    """`out = activate(gate, up)`, all contiguous float32 of one shape; returns `out`."""
    grid = (triton.cdiv(out.numel(), 64),)
    limit = cfg.activation_limit or 0.0
    options = (cfg.activation, cfg.gated, limit, cfg.activation_alpha)
    _elementwise_kernel[grid](gate, up, out, out.numel(), *options, BLOCK=64)
    return out
