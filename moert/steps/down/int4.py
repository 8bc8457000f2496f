"""Down GEMM of int4 weights in portable Triton, with bias and routing weight; see `gate_up/int4.py`.

direct: one program per (token, TILES tiles of 16 rows of w2) loops over the token's experts and so
combines without atomics, in a fixed order, into the caller's buffer. grouped: y[s] = weight[s] * (h[s]
@ w2[expert].T + b2) for blocks of BM sorted rows on matrix units; the combine step adds the K rows of
each token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.int4 import add_lanes, transposed_product
from moert.steps.int4_codes import (
    interleave_halves,
    lane_offsets,
    rows_of_lanes,
    step_offset,
    word_offsets,
)


@triton.jit(do_not_specialize=CALL_INTS)
def down_direct_int4_kernel(
    ids_ptr,
    ids_stride,
    ids_words,
    weights_f32_ptr,
    weights_ptr,
    weights_stride,
    weights_are_f32,
    out_ptr,
    out_stride,
    num_valid_ptr,
    num_tokens,
    pad_zero,
    h_ptr,
    w2_ptr,
    scales_ptr,
    zeros_ptr,
    b2_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    NT: tl.constexpr = (H + 15) // 16
    KT: tl.constexpr = (I + 63) // 64
    GN: tl.constexpr = (I + GROUP - 1) // GROUP
    tiles_n: tl.constexpr = (NT + TILES - 1) // TILES
    token = tl.program_id(0) // tiles_n
    tile = (tl.program_id(0) % tiles_n) * TILES
    n = tile * 16 + tl.arange(0, TILES * 16)
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if token >= num_tokens:
        return
    inside = n < H
    out = out_ptr + token.to(tl.int64) * out_stride + n
    if not alive:
        nothing = tl.zeros((TILES * 16,), out_ptr.dtype.element_ty)
        tl.store(out, nothing, mask=inside & (pad_zero != 0))
        return
    tile_words = word_offsets(tile, NT, KT, BLOCKS, TILES, WORDS)
    tile_values = lane_offsets(tile, NT, GN, TILES)
    first = tl.zeros((BLOCKS, TILES, 32, WORDS), tl.float32)
    second = tl.zeros((BLOCKS, TILES, 32, WORDS), tl.float32)
    bias = tl.zeros((TILES * 16,), tl.float32)
    STEP: tl.constexpr = BLOCKS * WORDS * 16
    STEPS: tl.constexpr = (I + STEP - 1) // STEP
    for step in tl.range(0, K * STEPS):
        slot = step // STEPS
        k0 = (step % STEPS) * STEP
        expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
        routed = expert >= 0
        # the weight of an id that no expert has may be anything, NaN included
        weight = load_routing_weight(
            weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, routed
        )
        e64 = tl.maximum(expert, 0).to(tl.int64)
        words = e64 * (NT * KT * 128) + tile_words
        values = e64 * (NT * GN * 16) + tile_values + (k0 // GROUP) * 16
        zeros = None
        if zeros_ptr is not None:
            zeros = zeros_ptr + values
        first, second = add_lanes(
            first,
            second,
            w2_ptr,
            words + step_offset(k0, WORDS),
            h_ptr + (token * K + slot).to(tl.int64) * I,
            None,
            k0,
            I,
            scales_ptr + values,
            zeros,
            weight,
            routed,
            BLOCKS,
            WORDS,
        )
        if b2_ptr is not None:
            mask = inside & routed & (k0 == 0)
            b = tl.load(b2_ptr + e64 * H + n, mask=mask, other=0.0)
            bias += b.to(tl.float32) * weight
    first, second = rows_of_lanes(first, second, BLOCKS, TILES, WORDS)
    total = interleave_halves(first, second, TILES) + bias
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def down_grouped_int4_kernel(
    sorted_token_ids,
    sorted_weights,
    sorted_expert_ids,
    num_valid_ids,
    h_ptr,
    w2_ptr,
    scales_ptr,
    zeros_ptr,
    b2_ptr,
    y_ptr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    WAY: tl.constexpr,
    PDL: tl.constexpr,
):
    NT: tl.constexpr = (H + 15) // 16
    tiles_n: tl.constexpr = (NT + TILES - 1) // TILES
    block = tl.program_id(0) // tiles_n
    tile = (tl.program_id(0) % tiles_n) * TILES
    # the sort is older than the gate/up GEMM, so it may be read before that has finished
    live_block = block * BM < tl.load(num_valid_ids)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if not live_block:
        return
    expert = tl.load(sorted_expert_ids + block).to(tl.int64)
    sorted_rows = block * BM + tl.arange(0, BM)
    packed = tl.load(sorted_token_ids + sorted_rows)
    slot = packed >> 24
    live = slot < K  # padding slots carry K
    rows = tl.where(live, (packed & 0xFFFFFF) * K + slot, 0).to(tl.int64)
    acc = transposed_product(
        h_ptr + rows * I,
        live,
        None,
        w2_ptr,
        scales_ptr,
        zeros_ptr,
        expert,
        tile,
        I,
        NT,
        GROUP,
        BM,
        TILES,
        BLOCKS,
        WORDS,
        STAGES,
        WAY,
    )
    n = tile * 16 + tl.arange(0, TILES * 16)
    if b2_ptr is not None:
        b = tl.load(b2_ptr + expert * H + n, mask=n < H, other=0.0)
        acc += b.to(tl.float32)[:, None]
    weight = tl.load(sorted_weights + sorted_rows)
    y = tl.trans((acc * weight[None, :]).to(y_ptr.dtype.element_ty))
    mask = live[:, None] & (n < H)[None, :]
    tl.store(y_ptr + rows[:, None] * H + n[None, :], y, mask=mask)
