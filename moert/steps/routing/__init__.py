"""Routing: router logits [T, E] -> K expert ids and weights for every token."""

from __future__ import annotations

import torch

from moert.config import MoEConfig
from moert.errors import InputError
from moert.steps.routing.reference import route_reference
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
        UnsupportedError: more than 1024 experts on a GPU.
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
    """Raise InputError, naming what was given and what is needed, unless `route` can take these."""
    experts = cfg.num_experts
    if logits.dim() != 2 or logits.shape[1] != experts:
        raise InputError(f"logits: got shape {list(logits.shape)}, need [T, E={experts}]")
    if logits.dtype not in LOGIT_DTYPES:
        raise InputError(f"logits: got {logits.dtype}, need float32, bfloat16 or float16")
    if logits.stride(1) != 1 and experts > 1:
        raise InputError(f"logits: got strides {logits.stride()}, need an inner stride of 1")
    if (correction_bias is not None) != cfg.routing.correction_bias:
        given = "none" if correction_bias is None else "one"
        raise InputError(
            f"correction_bias: got {given}, but routing.correction_bias={cfg.routing.correction_bias}"
        )
    if correction_bias is not None:
        _check("correction_bias", correction_bias, (experts,), LOGIT_DTYPES, logits.device)
    if out is not None:
        shape = (logits.shape[0], cfg.top_k)
        _check("out.weights", out.weights, shape, (torch.float32,), logits.device)
        _check("out.ids", out.ids, shape, (torch.int32,), logits.device)


def _check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name}: got shape {list(tensor.shape)}, need {list(shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{name}: got {tensor.dtype}, need {wanted}")
    if tensor.device != device:
        raise InputError(f"{name}: got a tensor on {tensor.device}, need {device}, as the logits")
    if not tensor.is_contiguous():
        raise InputError(f"{name}: got strides {tensor.stride()}, need a contiguous tensor")
