"""The exchange form of int4 matrices, the layout of ROCm's skinny kernels (`fused_moe_wvSplitK_int4_gemm`).

Word i of a row holds columns 8i .. 8i+7: the even ones, ascending, in bits 0..15, the odd ones in the other
half, so that (w >> 4n) & 0x000F000F is the pair of columns 8i + 2n, 8i + 2n + 1.
Source: `skinny_gemms_int4.cu` and `hybrid_w4a16_moe.py` of the ROCm fork of vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moert.config import Quant
from moert.errors import ConfigError, WeightsError
from moert.quantization.int4_layout import (
    Int4Matrix,
    columns_per_group,
    empty_matrix,
    get_expert,
    put_expert,
)
from moert.quantization.nibbles import nibbles_to_words, words_to_nibbles


@dataclass(frozen=True, eq=False, slots=True)
class SkinnyInt4:
    """The int4 matrices [E, N, K] of a layer's experts, row by row; a weight is (code - zero point) * scale.

    Args:
        codes: [E, N, ceil(K / 8)] int32, see the module docstring.
        scales: [E, N, ceil(K / group_size)] of the activations' dtype.
        zeros: like scales, whole numbers 0..15; None means 8.
        columns: K.
        group_size: columns of a group, a positive multiple of 32; -1 for one group a row.
        permutation: [E, K] int32 where columns are stored in another order, see `Int4Matrix`. ROCm's kernels
            know none: their input would have to be gathered before.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    columns: int
    group_size: int
    permutation: torch.Tensor | None = None


def pack(given: SkinnyInt4, name: str = "matrix", *, paired: bool) -> Int4Matrix:
    """The packed layout of the same codes, scales and zero points, on their device.

    Args:
        name: for errors.
        paired: the rows are I gate rows, then I up rows.

    Raises:
        WeightsError: shapes or dtypes that do not fit, zero points that are not whole numbers 0..15.
    """
    quant = _check(given, name, paired)
    experts, rows, _ = given.codes.shape
    matrix = empty_matrix(
        experts,
        rows,
        given.columns,
        quant,
        given.scales.dtype,
        given.codes.device,
        paired=paired,
        permuted=given.permutation is not None,
    )
    for e in range(experts):
        # bits 4n + 16 v0 of a word: column 2n + v0 of its eight
        halves = words_to_nibbles(given.codes[e]).unflatten(-1, (2, 4))
        codes = halves.transpose(-1, -2).reshape(rows, -1)[:, : given.columns]
        zeros = None if given.zeros is None else given.zeros[e]
        permutation = None if given.permutation is None else given.permutation[e]
        put_expert(matrix, e, codes, given.scales[e], zeros, permutation)
    return matrix


def unpack(matrix: Int4Matrix) -> SkinnyInt4:
    """The exact inverse of `pack`; a last word that K does not fill up has codes 8 behind it."""
    experts, rows, columns = matrix.shape
    groups, words = matrix.scales.shape[2], -(-columns // 8)
    scales = torch.empty(experts, rows, groups, dtype=matrix.dtype, device=matrix.device)
    zeros = None if matrix.zeros is None else torch.empty_like(scales)
    packed = torch.empty(experts, rows, words, dtype=torch.int32, device=matrix.device)
    for e in range(experts):
        codes, scales[e], zero = get_expert(matrix, e)
        if zeros is not None and zero is not None:
            zeros[e] = zero
        filled = torch.nn.functional.pad(codes, (0, 8 * words - columns), value=8)
        packed[e] = nibbles_to_words(filled.view(rows, words, 4, 2).transpose(-1, -2).flatten(-2))
    permutation = None if matrix.permutation is None else matrix.permutation.clone()
    whole = matrix.group_size == columns_per_group(-1, columns)
    return SkinnyInt4(
        packed, scales, zeros, columns, -1 if whole else matrix.group_size, permutation
    )


def _check(given: SkinnyInt4, name: str, paired: bool) -> Quant:
    """The description of what was given; raises WeightsError if it does not fit itself."""
    try:
        quant = Quant("int4", given.group_size, given.zeros is None)
    except ConfigError as error:
        raise WeightsError(f"{name}: {error}") from None
    if given.codes.dtype != torch.int32 or given.codes.ndim != 3:
        raise WeightsError(
            f"{name}.codes: got {given.codes.dtype} {list(given.codes.shape)}, need int32 [E, N, ceil(K / 8)]"
        )
    experts, rows, words = given.codes.shape
    columns, group = given.columns, columns_per_group(given.group_size, given.columns)
    if type(columns) is not int or columns < 1 or -(-columns // 8) != words:
        raise WeightsError(
            f"{name}.columns={columns!r}: {words} words a row hold {8 * words - 7}..{8 * words} columns"
        )
    if paired and rows % 2:
        raise WeightsError(f"{name}.codes: {rows} rows, need as many gate rows as up rows")
    needed = (experts, rows, -(-columns // group))
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for part, tensor in (("scales", given.scales), ("zeros", given.zeros)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != needed:
            raise WeightsError(
                f"{name}.{part}: shape {list(tensor.shape)}, need {list(needed)} for K={columns} in groups "
                f"of {group}"
            )
        if tensor.dtype not in floats or tensor.dtype != given.scales.dtype:
            raise WeightsError(
                f"{name}.{part}: dtype {tensor.dtype}, need the activations': {', '.join(map(str, floats))}"
            )
    if given.zeros is not None:
        check_zeros(f"{name}.zeros", given.zeros)
    order = given.permutation
    if order is not None and (
        tuple(order.shape) != (experts, columns) or order.dtype != torch.int32
    ):
        raise WeightsError(
            f"{name}.permutation: got {order.dtype} {list(order.shape)}, need int32 {[experts, columns]}"
        )
    return quant


def check_zeros(name: str, zeros: torch.Tensor) -> None:
    """Refuse zero points that are not whole numbers 0..15.

    Raises:
        WeightsError: one that is not, with its value.
    """
    if zeros.is_meta:
        return
    wrong = ~((zeros >= 0) & (zeros <= 15) & (zeros == zeros.floor()))  # NaN is wrong, too
    if bool(wrong.any()):
        raise WeightsError(
            f"{name}: a zero point is {float(zeros[wrong][0]):g}, need whole numbers 0..15"
        )
