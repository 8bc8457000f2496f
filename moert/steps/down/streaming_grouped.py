"""Down GEMM as a stream of weights and of several rows beside them (`moert/steps/streaming`).

grouped: one program per (block of BM sorted rows, row tiles of w2), which may take the blocks behind its
own, too. gathered: one program per (routed row, row tiles), which takes all rows of its expert, or none; for
up to BM tokens, without a sort. The combine step adds up. The routing, or the sort, is older than the gate/up
GEMM: weights are asked for before the wait for h.

The portable twins are the grouped kernels of `down/triton.py` and `down/int4.py`, and, of gathered,
the direct ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moert.steps.call_args import CALL_INTS, live_tokens, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.down.streaming import bias
from moert.steps.streaming.copies import copy_inputs
from moert.steps.streaming.products import advance
from moert.steps.streaming.rows import (
    block_and_tile,
    gathered_rows,
    input_layout,
    load_rows,
    output_layout,
    taken_blocks,
)
from moert.steps.streaming.stages import ask, input_ring, rings


@gluon.jit
def _multiply(
    ring,
    hs,
    h_ptr,
    packed,
    packed_out,
    weight,
    expert,
    tile,
    w,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """y of the rows [bm] that `packed` and `packed_out` name, in the layouts that h and y have, times
    `weight` [bm]. The first stages of weights have been asked for.

    Args:
        ring, w: as for `ask`; hs: of `input_ring`.
    """
    e64 = expert.to(gl.int64)
    live = (packed >> 24) < K  # padding carries K
    row = gl.where(live, (packed & 0xFFFFFF) * K + (packed >> 24), 0)
    h_rows = h_ptr + row.to(gl.int64) * S.reduction
    for i in gl.static_range(S.stages - 1):
        copy_inputs(hs, i, h_rows, live, i, S)
        async_copy.commit_group()
    row = (packed_out & 0xFFFFFF) * K + (packed_out >> 24)
    out = gl.expand_dims(y_ptr + row.to(gl.int64) * S.columns, 0)
    stored = gl.expand_dims((packed_out >> 24) < K, 0)
    acc = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)
    for step in range(S.iterations):
        acc = advance(acc, ring, hs, step, tile, w, e64, h_rows, live, S)
        if step % S.steps == S.steps - 1:
            y = gl.convert_layout(gl.sum(acc, 0), S.out)
            first = (tile + (step // S.steps) * S.row_tiles) * 16
            n = gl.expand_dims(first + gl.arange(0, S.rows, gl.SliceLayout(1, S.out)), 1)
            if b2_ptr is not None:
                y += bias(b2_ptr, expert, 1.0, n, S)
            y = (y * gl.expand_dims(weight, 0)).to(y_ptr.dtype.element_ty)
            gl.store(out + n, y, mask=(n < S.columns) & stored)
            acc = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)


@gluon.jit
def _multiply_taken(
    ring,
    hs,
    h_ptr,
    sorted_token_ids,
    sorted_weights,
    block,
    taken,
    expert,
    tile,
    w,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    """`taken` blocks, by the instructions for S.wide."""
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, S.matrix))
    OUT: gl.constexpr = gl.SliceLayout(0, S.out)
    packed = load_rows(sorted_token_ids, block, taken, L, K, S)
    packed_out = load_rows(sorted_token_ids, block, taken, OUT, K, S)
    at = sorted_weights + block * (S.bm // S.wide) + gl.arange(0, S.bm, OUT)
    weight = gl.load(at, mask=(packed_out >> 24) < K, other=0.0)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    _multiply(ring, hs, h_ptr, packed, packed_out, weight, expert, tile, w, b2_ptr, y_ptr, K, S)


@gluon.jit
def _multiply_blocks(
    ring,
    hs,
    h_ptr,
    sorted_token_ids,
    sorted_weights,
    block,
    taken,
    expert,
    tile,
    w,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    WIDE: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    """`taken` blocks, by the instructions for the fewest that hold them: WIDE, or more."""
    if S.together == WIDE:
        _multiply_taken(
            ring, hs, h_ptr, sorted_token_ids, sorted_weights, block, taken, expert, tile, w,
            b2_ptr, y_ptr, K, S.taking(WIDE), PDL,
        )  # fmt: skip
    elif taken <= WIDE:
        _multiply_taken(
            ring, hs, h_ptr, sorted_token_ids, sorted_weights, block, taken, expert, tile, w,
            b2_ptr, y_ptr, K, S.taking(WIDE), PDL,
        )  # fmt: skip
    else:
        _multiply_blocks(
            ring, hs, h_ptr, sorted_token_ids, sorted_weights, block, taken, expert, tile, w,
            b2_ptr, y_ptr, K, 2 * WIDE, S, PDL,
        )  # fmt: skip


@gluon.jit
def down_grouped_stream_kernel(
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
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = h_ptr.dtype.element_ty
    ring, hs = rings(DTYPE, S), input_ring(DTYPE, S)
    w = (w2_ptr, scales_ptr, zeros_ptr)
    block, tile = block_and_tile(S)
    # loaded together; past the last block there is anything, which nobody uses
    blocks = gl.load(num_valid_ids) // S.bm
    expert = gl.load(sorted_expert_ids + block)
    if block >= blocks:
        wait_for_predecessor(PDL)
        let_successor_start(PDL)
        return
    taken = 1
    if S.together > 1:
        taken = taken_blocks(sorted_expert_ids, block, blocks, expert, S)
        if taken == 0:
            wait_for_predecessor(PDL)
            let_successor_start(PDL)
            return
    for i in gl.static_range(S.stages - 1):
        ask(ring, i, tile, w, expert.to(gl.int64), S)
        async_copy.commit_group()
    _multiply_blocks(
        ring, hs, h_ptr, sorted_token_ids, sorted_weights, block, taken, expert, tile, w,
        b2_ptr, y_ptr, K, 1, S, PDL,
    )  # fmt: skip


@gluon.jit(do_not_specialize=CALL_INTS)
def down_gathered_stream_kernel(
    ids_ptr,
    ids_stride,
    ids_words,
    weights_f32_ptr,
    weights_ptr,
    weights_stride,
    weights_are_f32,
    num_valid_ptr,
    num_tokens,
    h_ptr,
    w2_ptr,
    scales_ptr,
    zeros_ptr,
    b2_ptr,
    y_ptr,
    E: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = h_ptr.dtype.element_ty
    ring, hs = rings(DTYPE, S), input_ring(DTYPE, S)
    w = (w2_ptr, scales_ptr, zeros_ptr)
    tile = (gl.program_id(0) % S.tiles) * (S.row_tiles * S.repeats)
    row = gl.program_id(0) // S.tiles
    live = live_tokens(num_tokens, num_valid_ptr)
    packed, expert = gathered_rows(ids_ptr, ids_stride, ids_words, live, row, E, K, S)
    if expert < 0:
        wait_for_predecessor(PDL)
        let_successor_start(PDL)
        return
    for i in gl.static_range(S.stages - 1):
        ask(ring, i, tile, w, expert.to(gl.int64), S)
        async_copy.commit_group()
    packed_out = output_layout(packed, S)
    slot = packed_out >> 24
    weight = load_routing_weight(
        weights_f32_ptr,
        weights_ptr,
        weights_stride,
        weights_are_f32,
        packed_out & 0xFFFFFF,
        slot,
        slot < K,
    )
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    packed = input_layout(packed, S)
    _multiply(ring, hs, h_ptr, packed, packed_out, weight, expert, tile, w, b2_ptr, y_ptr, K, S)
