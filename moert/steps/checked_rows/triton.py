"""Kernels that make a call fit for operators which check nothing."""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight


@triton.jit(do_not_specialize=CALL_INTS)
def checked_rows_kernel(
    ids_ptr, ids_stride, ids_words, weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
    num_valid_ptr, num_tokens, checked_ids_ptr, checked_weights_ptr,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """checked_ids [T, K] int32 in 0..E and checked_weights [T, K] fp32, both without gaps.

    Id E, one past the last expert, stands for every row that no expert has: an id outside 0..E-1, or a token
    from the live count on, whose id and weight are not read.
    """
    live = live_tokens(num_tokens, num_valid_ptr)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, slot = row // K, row % K
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, token < live, E)
    weight = load_routing_weight(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, token < live
    )
    there = token < num_tokens
    tl.store(checked_ids_ptr + row, tl.where(expert >= 0, expert, E), mask=there)
    tl.store(checked_weights_ptr + row, weight, mask=there)


@triton.jit(do_not_specialize=CALL_INTS)
def clear_live_rows_kernel(
    out_ptr, out_stride, num_valid_ptr, num_tokens, H: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """out [T, H] becomes zero up to the live count; one program a row, rows from there on are left alone."""
    token = tl.program_id(0)
    if token < live_tokens(num_tokens, num_valid_ptr):
        row = out_ptr + token.to(tl.int64) * out_stride
        for start in tl.static_range(0, H, BN):
            column = start + tl.arange(0, BN)
            zero = tl.zeros([BN], tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(row + column, zero, mask=column < H)
