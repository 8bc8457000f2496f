"""Refuses a bad call before anything is launched or changed: the argument, what was given, what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.call import Key
from moert.config import MoEConfig
from moert.errors import InputError
from moert.tensor_check import check_tensor
from moert.topk import ID_DTYPES, TopK

PADS = ("keep", "zero")


def check_forward(
    cfg: MoEConfig,
    device: torch.device,
    x: torch.Tensor,
    topk: TopK | None,
    out: torch.Tensor,
    num_valid: torch.Tensor | None,
    pad: str,
) -> None:
    """Everything `MoERuntime.forward`, or `forward_block` without a topk, needs of its arguments.

    Raises:
        InputError: x, out not [T, H] of the model's dtype; topk not [T, K]; another device; an inner
            stride other than 1; overlapping rows of out; requires_grad; out overlapping an input; num_valid
            not one int32; pad unknown.
    """
    dtype, tokens = cfg.torch_dtype, rows_of("x", x, f"H={cfg.hidden_size}")
    weights, wide, narrow = (torch.float32, dtype), (tokens, cfg.hidden_size), (tokens, cfg.top_k)
    check_tensor("x", x, (dtype,), device, wide, gradients=False)
    check_tensor("out", out, (dtype,), device, wide, gradients=False)
    inputs = [("x", x)]
    if topk is not None:
        check_tensor("topk.ids", topk.ids, ID_DTYPES, device, narrow, gradients=False)
        check_tensor("topk.weights", topk.weights, weights, device, narrow, gradients=False)
        inputs += [("topk.ids", topk.ids), ("topk.weights", topk.weights)]
    if tokens > 1 and out.stride(0) < cfg.hidden_size:
        raise InputError(f"out: got row stride {out.stride(0)}, need at least H={cfg.hidden_size}")
    for name, tensor in inputs:
        if tokens and overlap(out, tensor):
            raise InputError(f"out: overlaps {name} in memory, need a buffer of its own")
    if num_valid is not None:
        check_num_valid(device, num_valid)
        if tokens and overlap(out, num_valid.view(1, 1)):
            raise InputError("out: overlaps num_valid in memory, need a buffer of its own")
    if pad not in PADS:
        raise InputError(f"pad: got {pad!r}, need one of {', '.join(PADS)}")


def plainly_fine(cfg: MoEConfig, index: int, key: Key, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a call needs no closer look: what `check_forward` would find, in a microsecond.

    False only means that `check_forward` has to decide (it alone raises).

    Args:
        index: of the GPU that all tensors must be on.
        key: `call_key` of the call.
        tensors: x, out, topk.weights, topk.ids.
    """
    x_ptr, out_ptr, weights_ptr, ids_ptr, x_shape, out_shape, weights_shape, ids_shape = key[:8]
    x_stride, out_stride, weights_stride, ids_stride, x_dtype, out_dtype = key[8:14]
    if not len(x_shape) == len(out_shape) == 2:
        return False
    tokens, dtype = x_shape[0], cfg.torch_dtype
    # extents from the first to behind the last row
    x_end = x_ptr + tokens * x_stride[0] * dtype.itemsize
    out_end = out_ptr + tokens * out_stride[0] * dtype.itemsize
    return (
        x_shape == out_shape == (tokens, cfg.hidden_size)
        and weights_shape == ids_shape == (tokens, cfg.top_k)
        and x_stride[1] == out_stride[1] == weights_stride[1] == ids_stride[1] == 1
        and x_stride[0] >= cfg.hidden_size <= out_stride[0]
        and weights_stride[0] >= cfg.top_k <= ids_stride[0]
        and x_dtype is out_dtype is dtype
        and (key[14] is torch.float32 or key[14] is dtype)
        and key[15] in ID_DTYPES
        and not key[16]
        and key[17] in PADS
        and key[18] is None
        and (out_end <= x_ptr or x_end <= out_ptr)
        and not out_ptr <= weights_ptr < out_end
        and not out_ptr <= ids_ptr < out_end
        and not weights_ptr <= out_ptr < weights_ptr + 4 * tokens * weights_stride[0]
        and not ids_ptr <= out_ptr < ids_ptr + 8 * tokens * ids_stride[0]
        and all(tensor.get_device() == index for tensor in tensors)
    )


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
    tokens = rows_of("router_logits", logits, f"E={cfg.num_experts}")
    floats = (torch.float32, torch.bfloat16, torch.float16)
    shape = (tokens, cfg.num_experts)
    check_tensor("router_logits", logits, floats, device, shape, gradients=False)


def rows_of(name: str, tensor: torch.Tensor, columns: str) -> int:
    """T of a tensor that has to be [T, columns].

    Raises:
        InputError: anything but a tensor of two dimensions.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        tensors = isinstance(tensor, torch.Tensor)
        given = f"shape {list(tensor.shape)}" if tensors else type(tensor).__name__
        raise InputError(f"{name}: got {given}, need a tensor [T, {columns}]")
    return tensor.shape[0]


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
