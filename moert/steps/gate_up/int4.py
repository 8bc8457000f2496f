"""Gate/up GEMM of int4 weights in portable Triton: h[s] = act(x[token] @ w13[expert].T + b13[expert]).

Weights as `moert/quantization/int4_layout.py` packs them. What is written is as in `gate_up/triton.py`.
Where a permutation is given (act-order), x is gathered by it.

direct: one program per (row, TILES tiles of 16 rows of w13), multiply-adds in fp32 on widened codes.
grouped: one program per (block of BM sorted rows, TILES tiles): out^T = W x^T on matrix units. The
weights are the first operand, in registers: on Hopper they go from the asynchronous copy through a
shift and an AND-OR into `wgmma`, in the very registers that they were read to. Scales are read one step
ahead, and multiply the fp32 product of their group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.activation.triton import activate
from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.int4_codes import (
    interleave_halves,
    lane_columns,
    lane_offsets,
    nibble,
    row_offsets,
    rows_of_lanes,
    step_offset,
    widen,
    word_offsets,
)


@triton.jit
def add_lanes(
    first,
    second,
    codes_ptr,
    words,
    x_row,
    permutation_ptr,
    k0,
    KC: tl.constexpr,
    scales,
    zeros,
    weight,
    live,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Add scale * (code - zero point) * x of one step to what the lanes have of rows g and g + 8.

    Args:
        first, second: [BLOCKS, TILES, 32, WORDS] fp32.
        words: offsets of the codes of this step, of the same shape.
        x_row: the first element of the row of inputs.
        k0: the step's first column.
        scales, zeros: pointers [1, TILES, 32, 1] to the values of row g; zeros None for 8.
        weight: multiplies the row.
        live: False adds nothing.
    """
    KT: tl.constexpr = (KC + 63) // 64
    inside = (k0 // 64 + tl.arange(0, BLOCKS) < KT)[:, None, None, None] & live
    codes = tl.load(codes_ptr + words, mask=inside & (words >= 0), other=0)
    s_first = tl.load(scales).to(tl.float32) * weight
    s_second = tl.load(scales + 8).to(tl.float32) * weight
    z_first = tl.zeros_like(s_first)
    z_second = z_first
    if zeros is not None:
        z_first = tl.load(zeros).to(tl.float32) - 8.0
        z_second = tl.load(zeros + 8).to(tl.float32) - 8.0
    for v2 in tl.static_range(2):
        for v0 in tl.static_range(2):
            column = k0 + lane_columns(BLOCKS, WORDS, v2, v0)
            known = live & (column < KC)
            if permutation_ptr is not None:
                column = tl.load(permutation_ptr + column, mask=known, other=0)
            x = tl.load(x_row + column, mask=known, other=0.0).to(tl.float32)
            first += (nibble(codes, v2, 0, v0).to(tl.float32) - z_first) * s_first * x
            second += (nibble(codes, v2, 1, v0).to(tl.float32) - z_second) * s_second * x
    return first, second


@triton.jit(do_not_specialize=CALL_INTS)
def gate_up_direct_int4_kernel(
    x_ptr,
    x_stride,
    ids_ptr,
    ids_stride,
    ids_words,
    num_valid_ptr,
    num_tokens,
    w13_ptr,
    scales_ptr,
    zeros_ptr,
    permutation_ptr,
    b13_ptr,
    h_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    NT: tl.constexpr = (I + 7) // 8 if GATED else (I + 15) // 16
    KT: tl.constexpr = (H + 63) // 64
    GN: tl.constexpr = (H + GROUP - 1) // GROUP
    tiles_n: tl.constexpr = (NT + TILES - 1) // TILES
    tile = (tl.program_id(0) % tiles_n) * TILES
    row = tl.program_id(0) // tiles_n
    token, slot = row // K, row % K
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
    if expert < 0:
        return
    e64 = expert.to(tl.int64)
    x_row = x_ptr + token.to(tl.int64) * x_stride
    words = e64 * (NT * KT * 128) + word_offsets(tile, NT, KT, BLOCKS, TILES, WORDS)
    values = e64 * (NT * GN * 16) + lane_offsets(tile, NT, GN, TILES)
    permutation = None
    if permutation_ptr is not None:
        permutation = permutation_ptr + e64 * H
    first = tl.zeros((BLOCKS, TILES, 32, WORDS), tl.float32)
    second = tl.zeros((BLOCKS, TILES, 32, WORDS), tl.float32)
    STEP: tl.constexpr = BLOCKS * WORDS * 16
    for k0 in tl.range(0, H, STEP):
        group = (k0 // GROUP) * 16
        zeros = None
        if zeros_ptr is not None:
            zeros = zeros_ptr + values + group
        first, second = add_lanes(
            first,
            second,
            w13_ptr,
            words + step_offset(k0, WORDS),
            x_row,
            permutation,
            k0,
            H,
            scales_ptr + values + group,
            zeros,
            1.0,
            alive,
            BLOCKS,
            WORDS,
        )
    gate, up = rows_of_lanes(first, second, BLOCKS, TILES, WORDS)
    if GATED:
        n = tile * 8 + tl.arange(0, TILES * 8)
    else:
        up = interleave_halves(gate, up, TILES)
        gate = up
        n = tile * 16 + tl.arange(0, TILES * 16)
    if b13_ptr is not None:
        bias = b13_ptr + e64 * (2 * I if GATED else I)
        gate, up = add_bias(gate, up, bias, n, I, GATED, False)
    h = activate(gate, up, ACTIVATION, GATED, LIMIT, ALPHA)
    tl.store(h_ptr + row.to(tl.int64) * I + n, h.to(h_ptr.dtype.element_ty), mask=n < I)


@triton.jit
def transposed_product(
    rows_ptr,
    live,
    permutation_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    expert,
    tile,
    KC: tl.constexpr,
    NT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    WAY: tl.constexpr,
):
    """W x^T [TILES * 16, BM] fp32 of row tiles from `tile` on and rows x [BM].

    Args:
        rows_ptr, live: [BM], the first elements of the rows of x and whether they are read.
        expert: int64.
    """
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    KT: tl.constexpr = (KC + 63) // 64
    GN: tl.constexpr = (KC + GROUP - 1) // GROUP
    STEP: tl.constexpr = BLOCKS * WORDS * 16
    codes_ptr += expert * (NT * KT * 128)
    scales_ptr += expert * (NT * GN * 16)
    if zeros_ptr is not None:
        zeros_ptr += expert * (NT * GN * 16)
    words = word_offsets(tile, NT, KT, BLOCKS, TILES, WORDS)
    values = row_offsets(tile, NT, GN, TILES)
    block = tl.arange(0, BLOCKS)[:, None, None, None]
    k = tl.arange(0, STEP)
    acc = tl.zeros((TILES * 16, BM), tl.float32)
    scale = tl.load(scales_ptr + values)
    for k0 in tl.range(0, KC, STEP, num_stages=STAGES):
        following = tl.minimum(k0 + STEP, KC - 1) // GROUP
        next_scale = tl.load(scales_ptr + values + following * 16)
        at = codes_ptr + step_offset(k0, WORDS)
        known = live[None, :]
        if KC % STEP == 0:
            codes = tl.load(at + words)
        else:
            codes = tl.load(at + words, mask=(k0 // 64 + block) < KT, other=0)
            known = known & ((k0 + k) < KC)[:, None]
        if permutation_ptr is None:
            column = k0 + k
        else:
            column = tl.load(permutation_ptr + k0 + k, mask=(k0 + k) < KC, other=0)
        x = tl.load(rows_ptr[None, :] + column[:, None], mask=known, other=0.0)
        w = widen(codes, DTYPE, BLOCKS, TILES, WORDS, WAY)
        product = tl.dot(w, x, input_precision="ieee")
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + values + (k0 // GROUP) * 16).to(tl.float32) - 8.0
            product -= zero[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
        acc += product * scale.to(tl.float32)[:, None]
        scale = next_scale
    return acc


@triton.jit(do_not_specialize=CALL_INTS)
def gate_up_grouped_int4_kernel(
    x_ptr,
    x_stride,
    sorted_token_ids,
    sorted_expert_ids,
    num_valid_ids,
    w13_ptr,
    scales_ptr,
    zeros_ptr,
    permutation_ptr,
    b13_ptr,
    h_ptr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    WAY: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    NT: tl.constexpr = (I + 7) // 8 if GATED else (I + 15) // 16
    tiles_n: tl.constexpr = (NT + TILES - 1) // TILES
    block = tl.program_id(0) // tiles_n
    tile = (tl.program_id(0) % tiles_n) * TILES
    if block * BM >= tl.load(num_valid_ids):
        return
    expert = tl.load(sorted_expert_ids + block).to(tl.int64)
    packed = tl.load(sorted_token_ids + block * BM + tl.arange(0, BM))
    token, slot = packed & 0xFFFFFF, packed >> 24
    live = slot < K  # padding slots carry K
    x_rows = x_ptr + tl.where(live, token, 0).to(tl.int64) * x_stride
    permutation = None
    if permutation_ptr is not None:
        permutation = permutation_ptr + expert * H
    acc = transposed_product(
        x_rows,
        live,
        permutation,
        w13_ptr,
        scales_ptr,
        zeros_ptr,
        expert,
        tile,
        H,
        NT,
        GROUP,
        BM,
        TILES,
        BLOCKS,
        WORDS,
        STAGES,
        WAY,
    )
    if GATED:
        halves = tl.permute(tl.reshape(acc, (TILES, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(halves)
        gate = tl.reshape(gate, (TILES * 8, BM))
        up = tl.reshape(up, (TILES * 8, BM))
        n = tile * 8 + tl.arange(0, TILES * 8)
    else:
        gate, up = acc, acc
        n = tile * 16 + tl.arange(0, TILES * 16)
    if b13_ptr is not None:
        bias = b13_ptr + expert * (2 * I if GATED else I)
        gate, up = add_bias(gate, up, bias, n[:, None], I, GATED, False)
    h = tl.trans(activate(gate, up, ACTIVATION, GATED, LIMIT, ALPHA).to(h_ptr.dtype.element_ty))
    rows = (token * K + slot).to(tl.int64)
    mask = live[:, None] & (n < I)[None, :]
    tl.store(h_ptr + rows[:, None] * I + n[None, :], h, mask=mask)
