"""Refuses a bad call before anything is launched or changed: the argument, what was given, what is needed."""

from __future__ import annotations

import torch

from moert.config import MoEConfig
from moert.errors import InputError
from moert.topk import ID_DTYPES, TopK

PADS = ("keep", "zero")


def check_forward(
    cfg: MoEConfig,
    device: torch.device,
    x: torch.Tensor,
    topk: TopK,
    out: torch.Tensor,
    num_valid: torch.Tensor | None,
    pad: str,
) -> None:
    """Everything `MoERuntime.forward` needs of its arguments.

    Raises:
        InputError: x, out not [T, H] of the model's dtype; topk not [T, K]; another device; an inner
            stride other than 1; overlapping rows of out; requires_grad; out overlapping an input; num_valid
            not one int32; pad unknown.
    """
    dtype, tokens = cfg.torch_dtype, x.shape[0] if x.dim() else 0
    _tensor("x", x, (tokens, cfg.hidden_size), (dtype,), device)
    _tensor("out", out, (tokens, cfg.hidden_size), (dtype,), device)
    _tensor("topk.ids", topk.ids, (tokens, cfg.top_k), ID_DTYPES, device)
    _tensor("topk.weights", topk.weights, (tokens, cfg.top_k), (torch.float32, dtype), device)
    if tokens > 1 and out.stride(0) < cfg.hidden_size:
        raise InputError(f"out: got row stride {out.stride(0)}, need at least H={cfg.hidden_size}")
    for name, tensor in (("x", x), ("topk.ids", topk.ids), ("topk.weights", topk.weights)):
        if tokens and overlap(out, tensor):
            raise InputError(f"out: overlaps {name} in memory, need a buffer of its own")
    if num_valid is not None:
        check_num_valid(device, num_valid)
    if pad not in PADS:
        raise InputError(f"pad: got {pad!r}, need one of {', '.join(PADS)}")


def check_num_valid(device: torch.device, num_valid: torch.Tensor) -> None:
    """One int32 value on the device, the live count.

    Raises:
        InputError: anything else.
    """
    if not isinstance(num_valid, torch.Tensor):
        raise InputError(
            f"num_valid: got {type(num_valid).__name__}, need one int32 tensor on {device}"
        )
    if num_valid.numel() != 1 or num_valid.dtype != torch.int32 or num_valid.device != device:
        given = f"{num_valid.dtype} {list(num_valid.shape)} on {num_valid.device}"
        raise InputError(f"num_valid: got {given}, need one int32 value on {device}")


def check_logits(cfg: MoEConfig, device: torch.device, logits: torch.Tensor) -> None:
    """Everything `MoERuntime.route` needs of its logits: [T, E], floating, unit inner stride.

    Raises:
        InputError: as for `check_forward`.
    """
    tokens = logits.shape[0] if logits.dim() else 0
    floats = (torch.float32, torch.bfloat16, torch.float16)
    _tensor("router_logits", logits, (tokens, cfg.num_experts), floats, device)


def _tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name}: got {type(tensor).__name__}, need a tensor {list(shape)}")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name}: got shape {list(tensor.shape)}, need {list(shape)}")
    if tensor.dtype not in dtypes:
        need = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        raise InputError(f"{name}: got {tensor.dtype}, need {need}")
    if tensor.device != device:
        raise InputError(f"{name}: got a tensor on {tensor.device}, need {device}")
    if tensor.requires_grad:
        raise InputError(
            f"{name}: got requires_grad=True, need a tensor without (no backward here)"
        )
    if tensor.layout != torch.strided:
        raise InputError(f"{name}: got layout {tensor.layout}, need a strided tensor")
    if shape[1] > 1 and tensor.stride(1) != 1:
        raise InputError(
            f"{name}: got strides {list(tensor.stride())}, need 1 between neighbours of a row"
        )


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two non-empty 2-D tensors with unit inner stride share a byte.

    Exact for rows of equal stride (columns of one buffer may interleave without touching); for unequal
    strides, overlapping extents count as overlap.
    """
    a_start, b_start = a.data_ptr(), b.data_ptr()
    a_row, b_row = a.shape[1] * a.element_size(), b.shape[1] * b.element_size()
    a_step, b_step = a.stride(0) * a.element_size(), b.stride(0) * b.element_size()
    a_end = a_start + (a.shape[0] - 1) * a_step + a_row
    b_end = b_start + (b.shape[0] - 1) * b_step + b_row
    if a_end <= b_start or b_end <= a_start:
        return False
    if a_step != b_step or a_step <= 0 or a.shape[0] == 1:
        return True
    shift = (b_start - a_start) % a_step
    return shift < a_row or shift + b_row > a_step
