"""A whole block in plain torch, fp32: router, routing rule, routed and shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moert.config import MoEConfig
from moert.steps.experts_reference import experts_reference
from moert.steps.routing.reference import route_reference
from moert.topk import TopK

if TYPE_CHECKING:
    from moert.weights import ExpertWeights


def router_logits_reference(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """`x @ router_weight.T + router_bias`, and where there is a shared gate one more column, of its logit.

    Args:
        x: [T, H], any floating dtype.

    Returns:
        [T, E] or [T, E + 1] float32.
    """
    assert weights.router_weight is not None
    logits = x.float() @ weights.router_weight.float().T
    if weights.router_bias is not None:
        logits = logits + weights.router_bias.float()
    if weights.shared_gate is not None:
        logits = torch.cat((logits, x.float() @ weights.shared_gate.float().T), dim=1)
    return logits


def with_shared(topk: TopK, logits: torch.Tensor, cfg: MoEConfig) -> TopK:
    """The routing of K + n slots: the last n are experts E, E + 1, ... of weight 1, or sigmoid(gate's logit).

    Args:
        topk: of the K routed ones. logits: as `router_logits_reference` gives them.
    """
    rows, count = logits.shape[0], cfg.shared_experts
    ids = torch.arange(cfg.num_experts, cfg.num_experts + count, dtype=torch.int32)
    weight = logits[:, cfg.num_experts :].sigmoid() if cfg.shared_gate else logits.new_ones(rows, 1)
    return TopK(
        torch.cat((topk.weights, weight.expand(rows, count)), dim=1),
        torch.cat((topk.ids, ids.to(topk.ids.device).expand(rows, count)), dim=1),
    )


def block_routing_reference(x: torch.Tensor, weights: ExpertWeights, cfg: MoEConfig) -> TopK:
    """TopK(weights [T, K + n] fp32, ids [T, K + n] int32) of a block's tokens x [T, H]."""
    logits = router_logits_reference(x, weights)
    routed = route_reference(logits[:, : cfg.num_experts], cfg, weights.correction_bias)
    return with_shared(routed, logits, cfg)


def block_reference(x: torch.Tensor, weights: ExpertWeights, cfg: MoEConfig) -> torch.Tensor:
    """What the whole block makes of x [T, H]: [T, H] float32."""
    topk = block_routing_reference(x, weights, cfg)
    return experts_reference(x, topk, weights, cfg.as_launched)
