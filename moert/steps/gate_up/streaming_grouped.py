"""Gate/up GEMM as a stream of weights and of several rows beside them (`moert/steps/streaming`).

grouped: one program per (block of BM sorted rows, row tiles of w13), which may take the blocks behind its
own, too. gathered: one program per (routed row, row tiles), which takes all rows of its expert, or none; for
up to BM tokens, without a sort. Which rows these are: `moert/steps/streaming/rows.py`.

The portable twins are the grouped kernels of `gate_up/triton.py` and `gate_up/int4.py`, and, of gathered,
the direct ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moert.steps.call_args import CALL_INTS, live_tokens
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.streaming import intermediate
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
    xs,
    x,
    packed,
    packed_out,
    expert,
    tile,
    w,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """h of the rows [bm] that `packed` and `packed_out` name, in the layouts that x and h have.

    Args:
        ring, w: as for `ask`; xs: of `input_ring`; x: pointer and distance of rows.
    """
    e64 = expert.to(gl.int64)
    x_ptr, x_stride = x
    live = (packed >> 24) < K  # padding carries K
    x_rows = x_ptr + gl.where(live, packed & 0xFFFFFF, 0).to(gl.int64) * x_stride
    for i in gl.static_range(S.stages - 1):
        ask(ring, i, tile, w, e64, S)
        copy_inputs(xs, i, x_rows, live, i, S)
        async_copy.commit_group()
    row = (packed_out & 0xFFFFFF) * K + (packed_out >> 24)
    out = gl.expand_dims(h_ptr + row.to(gl.int64) * S.columns, 0)
    stored = gl.expand_dims((packed_out >> 24) < K, 0)
    acc = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)
    for step in range(S.iterations):
        acc = advance(acc, ring, xs, step, tile, w, e64, x_rows, live, S)
        if step % S.steps == S.steps - 1:
            first = tile + (step // S.steps) * S.row_tiles
            n, h = intermediate(gl.sum(acc, 0), expert, first, b13_ptr, ACTIVATION, LIMIT, ALPHA, S)
            mask = gl.expand_dims(n < S.columns, 1) & stored
            gl.store(out + gl.expand_dims(n, 1), h.to(h_ptr.dtype.element_ty), mask=mask)
            acc = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)


@gluon.jit
def _multiply_taken(
    ring,
    xs,
    x,
    sorted_token_ids,
    block,
    taken,
    expert,
    tile,
    w,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """`taken` blocks, by the instructions for S.wide."""
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, S.matrix))
    packed = load_rows(sorted_token_ids, block, taken, L, K, S)
    packed_out = load_rows(sorted_token_ids, block, taken, gl.SliceLayout(0, S.out), K, S)
    _multiply(
        ring, xs, x, packed, packed_out, expert, tile, w, b13_ptr, h_ptr,
        K, ACTIVATION, LIMIT, ALPHA, S,
    )  # fmt: skip


@gluon.jit
def _multiply_blocks(
    ring,
    xs,
    x,
    sorted_token_ids,
    block,
    taken,
    expert,
    tile,
    w,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    WIDE: gl.constexpr,
    S: gl.constexpr,
):
    """`taken` blocks, by the instructions for the fewest that hold them: WIDE, or more."""
    if S.together == WIDE:
        _multiply_taken(
            ring, xs, x, sorted_token_ids, block, taken, expert, tile, w, b13_ptr, h_ptr,
            K, ACTIVATION, LIMIT, ALPHA, S.taking(WIDE),
        )  # fmt: skip
    elif taken <= WIDE:
        _multiply_taken(
            ring, xs, x, sorted_token_ids, block, taken, expert, tile, w, b13_ptr, h_ptr,
            K, ACTIVATION, LIMIT, ALPHA, S.taking(WIDE),
        )  # fmt: skip
    else:
        _multiply_blocks(
            ring, xs, x, sorted_token_ids, block, taken, expert, tile, w, b13_ptr, h_ptr,
            K, ACTIVATION, LIMIT, ALPHA, 2 * WIDE, S,
        )  # fmt: skip


@gluon.jit
def gate_up_grouped_stream_kernel(
    x_ptr,
    x_stride,
    sorted_token_ids,
    sorted_expert_ids,
    num_valid_ids,
    w13_ptr,
    scales_ptr,
    zeros_ptr,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = h_ptr.dtype.element_ty
    ring, xs = rings(DTYPE, S), input_ring(DTYPE, S)
    x, w = (x_ptr, x_stride), (w13_ptr, scales_ptr, zeros_ptr)
    block, tile = block_and_tile(S)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    # loaded together; past the last block there is anything, which nobody uses
    blocks = gl.load(num_valid_ids) // S.bm
    expert = gl.load(sorted_expert_ids + block)
    if block >= blocks:
        return
    taken = 1
    if S.together > 1:
        taken = taken_blocks(sorted_expert_ids, block, blocks, expert, S)
        if taken == 0:
            return
    _multiply_blocks(
        ring, xs, x, sorted_token_ids, block, taken, expert, tile, w, b13_ptr, h_ptr,
        K, ACTIVATION, LIMIT, ALPHA, 1, S,
    )  # fmt: skip


@gluon.jit(do_not_specialize=CALL_INTS)
def gate_up_gathered_stream_kernel(
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
    b13_ptr,
    h_ptr,
    E: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = h_ptr.dtype.element_ty
    ring, xs = rings(DTYPE, S), input_ring(DTYPE, S)
    x, w = (x_ptr, x_stride), (w13_ptr, scales_ptr, zeros_ptr)
    tile = (gl.program_id(0) % S.tiles) * (S.row_tiles * S.repeats)
    row = gl.program_id(0) // S.tiles
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    live = live_tokens(num_tokens, num_valid_ptr)
    packed, expert = gathered_rows(ids_ptr, ids_stride, ids_words, live, row, E, K, S)
    if expert < 0:
        return
    _multiply(
        ring, xs, x, input_layout(packed, S), output_layout(packed, S), expert, tile, w, b13_ptr, h_ptr,
        K, ACTIVATION, LIMIT, ALPHA, S,
    )  # fmt: skip
