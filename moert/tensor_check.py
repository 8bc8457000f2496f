"""Refuses a tensor that does not fit: its name, what was given, what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.errors import InputError


def check_tensor(
    name: str,
    tensor: object,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    shape: tuple[int, ...] | None = None,
    *,
    contiguous: bool = False,
    gradients: bool = True,
) -> None:
    """A strided tensor with unit stride between the last dimension's neighbours.

    Args:
        name: of the argument.
        dtypes: any of these.
        device: where it has to be.
        shape: exactly this; None for any.
        contiguous: no gaps between rows either.
        gradients: one that requires them is fine.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(tensor, torch.Tensor):
        need = "a tensor" if shape is None else f"a tensor {list(shape)}"
        raise InputError(f"{name}: got {type(tensor).__name__}, need {need}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise InputError(f"{name}: got shape {list(tensor.shape)}, need {list(shape)}")
    if tensor.dtype not in dtypes:
        need = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise InputError(f"{name}: got {tensor.dtype}, need {need}")
    if tensor.device != device:
        raise InputError(f"{name}: got a tensor on {tensor.device}, need {device}")
    if tensor.requires_grad and not gradients:
        raise InputError(
            f"{name}: got requires_grad=True, need a tensor without (no backward here)"
        )
    if tensor.layout != torch.strided:
        raise InputError(f"{name}: got layout {tensor.layout}, need a strided tensor")
    strides = list(tensor.stride())
    if contiguous and not tensor.is_contiguous():
        raise InputError(f"{name}: got strides {strides}, need a contiguous tensor")
    if tensor.dim() > 1 and tensor.shape[-1] > 1 and strides[-1] != 1:
        raise InputError(f"{name}: got strides {strides}, need 1 between neighbours of a row")
