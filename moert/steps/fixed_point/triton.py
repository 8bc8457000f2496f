"""Rows of 16-bit floats to fixed-point numbers: one program for each row and part of its columns."""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.fixed_point.layout import BITS as _BITS
from moert.steps.fixed_point.layout import STEP as _STEP

BITS = tl.constexpr(_BITS)
GROUP = tl.constexpr(_STEP)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: what it is added to becomes a whole number
_INFINITE = tl.constexpr(0x7F800000)
# 2^-125, the least unit: its inverse is a number, and what is smaller counts as zero
_LEAST = tl.constexpr(0x1000000)


@triton.jit
def unit(largest):
    """What a unit is worth, and its inverse, where the largest magnitude has these bits; NaN where that is
    infinite or not a number."""
    power = largest & _INFINITE
    infinite = power == _INFINITE
    power = tl.maximum(power, _LEAST + (BITS << 23))
    worth = (power - (BITS << 23)).to(tl.float32, bitcast=True)
    inverse = ((0x7F000000 - power) + (BITS << 23)).to(tl.float32, bitcast=True)
    return tl.where(infinite, float("nan"), worth), inverse


@triton.jit
def _split(
    row_ptr,
    planes_ptr,
    worth_ptr,
    sums_ptr,
    row,
    part,
    there,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
):
    """Columns part * PART.. of one row, where it is there.

    Args:
        sums_ptr: gets what the numbers of each group add up to; None where nobody asks.
    """
    GROUPS: tl.constexpr = PART // GROUP
    column = part * PART + tl.arange(0, PART)
    x = tl.load(row_ptr + column, mask=there & (column < COLUMNS), other=0.0).to(tl.float32)
    bits = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (GROUPS, GROUP))
    # whole numbers are in the order of magnitudes, and what is no number is above the infinite
    worth, inverse = unit(tl.max(bits, 1))
    scaled = tl.reshape(x, (GROUPS, GROUP)) * inverse[:, None]
    # a multiple of a half and a whole one to the nearest, ties to even, by the last bit of the sum
    number = (scaled + ROUND).to(tl.int32, bitcast=True) - 0x4B400000
    group = part * GROUPS + tl.arange(0, GROUPS)
    stored = there & (group < PADDED // GROUP)
    group += row * (PADDED // GROUP)
    tl.store(worth_ptr + group, worth, mask=stored)
    if sums_ptr is not None:
        total = tl.sum(number, 1).to(tl.float32)
        tl.store(sums_ptr + group, total * worth, mask=stored)
    number = tl.reshape(number, (PART // 16, 2, 4, 2))
    number = tl.reshape(tl.permute(number, (0, 2, 3, 1)), (PART,))
    base = planes_ptr + row * (2 * PADDED) + column
    stored = there & (column < PADDED)
    tl.store(base, (number >> 7).to(tl.int8), mask=stored)
    tl.store(base + PADDED, (number & 127).to(tl.int8), mask=stored)


@triton.jit(do_not_specialize=CALL_INTS)
def split_x_kernel(
    x_ptr,
    x_stride,
    num_valid_ptr,
    num_tokens,
    planes_ptr,
    worth_ptr,
    sums_ptr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of x [T, H] that are alive."""
    PARTS: tl.constexpr = (PADDED + PART - 1) // PART
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    there = row < live_tokens(num_tokens, num_valid_ptr)
    row = row.to(tl.int64)
    _split(
        x_ptr + row * x_stride, planes_ptr, worth_ptr, sums_ptr, row, part, there,
        COLUMNS, PADDED, PART,
    )  # fmt: skip


@triton.jit(do_not_specialize=CALL_INTS)
def split_h_kernel(
    h_ptr,
    num_valid_ptr,
    num_tokens,
    planes_ptr,
    worth_ptr,
    sums_ptr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of h [T * K, I] of tokens that are alive; those that nobody has written become anything."""
    PARTS: tl.constexpr = (PADDED + PART - 1) // PART
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    there = row // K < live_tokens(num_tokens, num_valid_ptr)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = row.to(tl.int64)
    _split(
        h_ptr + row * COLUMNS, planes_ptr, worth_ptr, sums_ptr, row, part, there,
        COLUMNS, PADDED, PART,
    )  # fmt: skip
