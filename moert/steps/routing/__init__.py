"""Routing: router logits [T, E] -> K expert ids and weights for every token."""

from __future__ import annotations

import torch

from moert.config import MoEConfig
from moert.errors import InputError, UnsupportedError
from moert.steps.routing.reference import route_reference
from moert.tensor_check import check_tensor
from moert.topk import TopK

__all__ = ["check_routing", "route", "route_reference"]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def route(
    logits: torch.Tensor,
    cfg: MoEConfig,
    correction_bias: torch.Tensor | None = None,
    out: TopK | None = None,
) -> TopK:
    """Choose K experts a token and weigh them: the reference on the CPU, one Triton kernel on a GPU.

    Args:
        logits: [T, E] fp32, bf16 or fp16, unit inner stride.
        cfg: gives E, K and the routing rule.
        correction_bias: [E] floating, on the logits' device; given if and only if the rule has one.
        out: TopK(weights [T, K] fp32, ids [T, K] int32), contiguous; written and returned. New
            tensors without it.

    Raises:
        InputError: an argument's shape, dtype, device or stride does not fit.
        UnsupportedError: fewer than K experts, or more than 1024 on a GPU.
    """
    check_routing(logits, cfg, correction_bias, out)
    if logits.device.type == "cpu":
        result = route_reference(logits, cfg, correction_bias)
        if out is None:
            return result
        out.weights.copy_(result.weights)
        out.ids.copy_(result.ids)
        return out
    from moert.steps.routing.triton import route_triton

    if out is None:
        shape = (logits.shape[0], cfg.top_k)
        out = TopK(
            logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
        )
    with torch.cuda.device(logits.device):
        route_triton(logits, cfg, correction_bias, out)
    return out


def check_routing(
    logits: torch.Tensor, cfg: MoEConfig, correction_bias: torch.Tensor | None, out: TopK | None
) -> None:
    """Raise InputError or UnsupportedError, with what was given and what is needed, unless `route` can."""
    experts = cfg.num_experts
    if not cfg.can_route:
        raise UnsupportedError(
            f"route: top_k={cfg.top_k} exceeds num_experts={experts}: there are too few to choose from"
        )
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] != experts:
        given = getattr(logits, "shape", None)
        given = type(logits).__name__ if given is None else f"shape {list(given)}"
        raise InputError(f"logits: got {given}, need [T, E={experts}]")
    device, shape = logits.device, (logits.shape[0], cfg.top_k)
    check_tensor("logits", logits, LOGIT_DTYPES, device)
    if (correction_bias is not None) != cfg.routing.correction_bias:
        given = "none" if correction_bias is None else "one"
        raise InputError(
            f"correction_bias: got {given}, but routing.correction_bias={cfg.routing.correction_bias}"
        )
    if correction_bias is not None:
        name = "correction_bias"
        check_tensor(name, correction_bias, LOGIT_DTYPES, device, (experts,), contiguous=True)
    if out is not None:
        check_tensor("out.weights", out.weights, (torch.float32,), device, shape, contiguous=True)
        check_tensor("out.ids", out.ids, (torch.int32,), device, shape, contiguous=True)
