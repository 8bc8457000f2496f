"""From floating weights to int4: which scale, which code.

Symmetric groups have the scale max|w| / 7.5 and codes round(w / scale) + 8, cut to 0..15. The largest
magnitude lies at most half a step beyond the outermost code, so that no weight is off by more than the half
step that rounding costs anyway, with steps 7% smaller than those of max|w| / 7. Asymmetric groups span
min(w, 0) to max(w, 0) in 15 steps; the zero point is the whole number that zero falls on. Codes are chosen
for the scale as it is stored, in the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moert.config import Quant
from moert.errors import WeightsError
from moert.quantization.int4_layout import (
    ZERO,
    Int4Matrix,
    columns_per_group,
    empty_matrix,
    put_expert,
)


def quantize_rows(
    weight: torch.Tensor, quant: Quant, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round a matrix to the nearest codes.

    Args:
        weight: [N, K] float32, bfloat16 or float16.
        name: for errors.

    Returns:
        (codes [N, K] uint8, scales [N, GN] of the weight's dtype, zeros [N, GN] float32 or None).

    Raises:
        WeightsError: NaN or an infinity among the weights.
    """
    rows, columns = weight.shape
    group = columns_per_group(quant.group_size, columns)
    groups = -(-columns // group)
    # zeros behind the last column change neither a maximum of magnitudes nor a range that contains zero
    values = torch.nn.functional.pad(weight.float(), (0, groups * group - columns))
    values = values.view(rows, groups, group)
    # several times quicker than aminmax
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if not weight.is_meta and not bool((low.isfinite() & high.isfinite()).all()):
        raise WeightsError(f"{name}: NaN or infinity among the weights, need finite values")
    if quant.symmetric:
        scales = (torch.maximum(-low, high) / 7.5).to(weight.dtype)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high / 15 - low / 15).to(weight.dtype)
    # a group of zeros has scale 0, as has one too small for the dtype: any codes mean zero then
    step = scales.float()
    step = torch.where(step > 0, step, 1)
    zeros = None if quant.symmetric else (-low / step).round_().clamp_(0, 15)
    codes = (values / step).round_().add_(ZERO if zeros is None else zeros).clamp_(0, 15)
    codes = codes.to(torch.uint8).view(rows, -1)[:, :columns]
    return codes, scales.squeeze(-1), None if zeros is None else zeros.squeeze(-1)


def quantize_matrix(
    weight: torch.Tensor, quant: Quant, name: str, *, paired: bool, interleaved: bool = False
) -> Int4Matrix:
    """The experts' matrices rounded and packed, one expert after another.

    Args:
        weight: [E, N, K] float32, bfloat16 or float16, any strides.
        name: for errors.
        paired: N = 2I rows of gate and up.
        interleaved: those rows alternate, even = gate; the result has gate rows before up rows.

    Raises:
        WeightsError: NaN or an infinity among the weights.
    """

    def rows_of(expert: int) -> torch.Tensor:
        rows = weight[expert]
        return torch.cat((rows[0::2], rows[1::2])) if interleaved else rows

    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    return quantize_experts(rows_of, shape, quant, weight.dtype, weight.device, name, paired=paired)


def quantize_experts(
    rows_of: Callable[[int], torch.Tensor],
    shape: tuple[int, int, int],
    quant: Quant,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
    *,
    paired: bool,
) -> Int4Matrix:
    """Like `quantize_matrix`, of matrices [N, K] that `rows_of(expert)` makes when they are needed."""
    matrix = empty_matrix(*shape, quant, dtype, device, paired=paired)
    for e in range(shape[0]):
        put_expert(matrix, e, *quantize_rows(rows_of(e), quant, f"{name}[{e}]"))
    return matrix
