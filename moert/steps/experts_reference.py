"""The expert computation as a formula: the ground truth of every kernel test."""

from __future__ import annotations

from typing import Protocol

import torch

from moert.config import MoEConfig
from moert.steps.activation import activate_reference
from moert.topk import TopK


class ExpertMatrix(Protocol):
    """[E, N, K]: a tensor, or a quantised matrix that dequantises an expert's [N, K] where it is indexed."""

    def __getitem__(self, expert: int, /) -> torch.Tensor: ...


class ExpertTensors(Protocol):
    """The tensors of one layer's experts, logical shapes, any strides or quantised.

    w13 [E, 2I, H] (gate rows then up rows, or alternating if `interleaved`; [E, I, H] without a
    gate), w2 [E, H, I], b13 [E, 2I] and b2 [E, H] or None.
    """

    @property
    def w13(self) -> ExpertMatrix: ...
    @property
    def w2(self) -> ExpertMatrix: ...
    @property
    def b13(self) -> torch.Tensor | None: ...
    @property
    def b2(self) -> torch.Tensor | None: ...
    @property
    def interleaved(self) -> bool: ...


def experts_reference(
    x: torch.Tensor, topk: TopK, weights: ExpertTensors, cfg: MoEConfig
) -> torch.Tensor:
    """`y[t] = sum over k of weight[t, k] * expert[id[t, k]](x[t])`, everything in float32.

    Args:
        x: [T, H], any float dtype; not modified.
        topk: routing; an id outside 0..E-1 contributes zero, an id that a token names twice counts
            twice.
        weights: the experts' tensors, any float dtype or quantised.

    Returns:
        [T, H] float32.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(cfg.num_experts):
        tokens, slots = torch.where(topk.ids == e)
        if tokens.numel() == 0:
            continue
        rows = x[tokens].float()  # [n, H]
        h = rows @ weights.w13[e].float().T  # [n, 2I]
        if weights.b13 is not None:
            h = h + weights.b13[e].float()
        gate, up = split_gate_up(h, cfg.gated, weights.interleaved)
        rows = activate_reference(gate, up, cfg) @ weights.w2[e].float().T  # [n, H]
        if weights.b2 is not None:
            rows = rows + weights.b2[e].float()
        y.index_add_(0, tokens, rows * topk.weights[tokens, slots].float()[:, None])
    return y


def split_gate_up(
    h: torch.Tensor, gated: bool, interleaved: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Views (gate [n, I] or None, up [n, I]) of the first projection h [n, 2I] (or [n, I])."""
    if not gated:
        return None, h
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    half = h.shape[1] // 2
    return h[:, :half], h[:, half:]
