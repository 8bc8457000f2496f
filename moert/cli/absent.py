"""A layer whose tensors and device need not be there: shapes and strides only, on the meta device."""

from __future__ import annotations

import torch

from moert.config import MoEConfig
from moert.quantization.int4_layout import empty_matrix
from moert.weights import ExpertWeights, Matrix


def absent_weights(
    cfg: MoEConfig, *, interleaved: bool = False, transposed: bool = False
) -> ExpertWeights:
    """Weights of a layer without storage, in the layout asked for; see `ExpertWeights`.

    int4 weights have one layout, whatever is asked for.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=cfg.torch_dtype, device="meta")

    experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    routed, experts = experts, experts + cfg.shared_experts
    w13: Matrix
    w2: Matrix
    if cfg.quant is not None:
        where = (cfg.quant, cfg.torch_dtype, "meta")
        w13 = empty_matrix(experts, cfg.w13_rows, hidden, *where, paired=cfg.gated)
        w2 = empty_matrix(experts, hidden, inner, *where, paired=False)
        interleaved = False
    elif transposed:
        w13 = empty(experts, hidden, cfg.w13_rows).transpose(1, 2)
        w2 = empty(experts, inner, hidden).transpose(1, 2)
    else:
        w13, w2 = empty(experts, cfg.w13_rows, hidden), empty(experts, hidden, inner)
    b13, b2 = (empty(experts, cfg.w13_rows), empty(experts, hidden)) if cfg.bias else (None, None)
    correction = None
    if cfg.routing.correction_bias:
        correction = torch.empty(routed, dtype=torch.float32, device="meta")
    gate = empty(1, hidden) if cfg.shared_gate else None
    return ExpertWeights(w13, w2, b13, b2, correction, interleaved=interleaved, shared_gate=gate)
