"""Weights of a layer drawn at random: for tests, measurements and tuning."""

from __future__ import annotations

from typing import Any, Final

import torch

from moert.config import MoEConfig
from moert.quantization.experts import quantize_layer, random_matrix
from moert.quantization.int4_layout import Int4Matrix

# up to this many elements a layer is drawn on the CPU, so that every device gets the same values
SAME_EVERYWHERE: Final = 1 << 24


def random_parts(cfg: MoEConfig, seed: int, device: str | torch.device) -> dict[str, Any]:
    """The arguments of `ExpertWeights` that `ExpertWeights.random` describes, by name.

    They are on the CPU where the layer is small, else on the device.
    """
    experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    routed, experts = experts, experts + cfg.shared_experts
    small = experts * (cfg.w13_rows + inner) * hidden <= SAME_EVERYWHERE
    source = torch.device("cpu" if small else device)
    generator = torch.Generator(source).manual_seed(seed)

    def normal(std: float, *shape: int, dtype: torch.dtype = cfg.torch_dtype) -> torch.Tensor:
        values = torch.empty(shape, dtype=dtype, device=source)
        return values.normal_(0.0, std, generator=generator)

    def matrix(std: float, rows: int, columns: int, paired: bool) -> torch.Tensor | Int4Matrix:
        shape, dtype = (experts, rows, columns), cfg.torch_dtype
        if cfg.quant is None or small:
            return normal(std, *shape)
        return random_matrix(shape, std, cfg.quant, dtype, generator, paired=paired)

    # a weighted mean over K experts has 1/K of one expert's variance: w2 makes up for it
    w13 = matrix(hidden**-0.5, cfg.w13_rows, hidden, cfg.gated)
    w2 = matrix((cfg.top_k / inner) ** 0.5, hidden, inner, False)
    others = {"router_weight": normal(hidden**-0.5, routed, hidden)}
    if cfg.bias:
        others["b13"] = normal(0.1, experts, cfg.w13_rows)
        others["b2"] = normal(0.1, experts, hidden)
        others["router_bias"] = normal(0.1, routed)
    if cfg.routing.correction_bias:
        others["correction_bias"] = normal(0.1, routed, dtype=torch.float32)
    if cfg.shared_gate:
        others["shared_gate"] = normal(hidden**-0.5, 1, hidden)
    found: dict[str, Any] = {"w13": w13, "w2": w2, **others}
    if cfg.quant is not None and small:
        found |= quantize_layer(w13, w2, others.get("b13"), False, cfg.quant)
    return found
