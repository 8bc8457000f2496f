"""Gate/up GEMM as a stream of weights (`moert/steps/streaming`): int4 and 16-bit, NVIDIA.

The portable twins are `gate_up/triton.py` (16-bit) and `gate_up/int4.py`; what is written is the same.

direct: one program per (row, row tiles of w13); the row of x is staged whole. Where a program has several
rows: `gate_up/streaming_grouped.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moert.steps.activation.triton import activate
from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.streaming.inputs import load_row
from moert.steps.streaming.products import add, group_sums, one_row
from moert.steps.streaming.stages import ask, rings, take


@gluon.jit
def intermediate(
    r,
    expert,
    tile,
    b13_ptr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """w13 x [rows, bm] from row tile `tile` on -> columns n of h, [rows / 2] where gated, and h [.., bm]."""
    if S.paired:
        halves = gl.permute(gl.reshape(r, (S.row_tiles, 2, 8, S.bm)), (0, 2, 3, 1))
        gate, up = gl.split(halves)
        gate = gl.reshape(gate, (S.rows // 2, S.bm))
        up = gl.reshape(up, (S.rows // 2, S.bm))
    else:
        gate, up = r, r
    return activated(gate, up, expert, tile, b13_ptr, ACTIVATION, LIMIT, ALPHA, S)


@gluon.jit
def activated(
    gate,
    up,
    expert,
    tile,
    b13_ptr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """`intermediate` of gate and up [columns, inputs]; not gated: both are the same."""
    up = gl.convert_layout(up, S.out)
    gate = gl.convert_layout(gate, S.out) if S.paired else up
    first = tile * (8 if S.paired else 16)
    n = first + gl.arange(0, up.shape[0], gl.SliceLayout(1, S.out))
    if b13_ptr is not None:
        bias = b13_ptr + expert.to(gl.int64) * (S.columns * (2 if S.paired else 1))
        column = gl.expand_dims(n, 1)
        gate, up = add_bias(gate, up, bias, column, S.columns, S.paired, S.interleaved)
    return n, activate(gate, up, ACTIVATION, S.paired, LIMIT, ALPHA)


@gluon.jit(do_not_specialize=CALL_INTS)
def gate_up_direct_stream_kernel(
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
    ring, w = rings(DTYPE, S), (w13_ptr, scales_ptr, zeros_ptr)
    xs = gl.allocate_shared_memory(DTYPE, [S.staged, S.split, S.width], S.plain(3))
    tile = (gl.program_id(0) % S.tiles) * S.row_tiles
    row = gl.program_id(0) // S.tiles
    token, slot = row // K, row % K
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
    if expert < 0:
        return
    e64 = expert.to(gl.int64)
    for i in gl.static_range(S.stages - 1):
        ask(ring, i, tile, w, e64, S)
        async_copy.commit_group()
    x = load_row(x_ptr + token.to(gl.int64) * x_stride, None, S)
    xs.store(x)
    sums = None
    if S.int4:
        sums = group_sums(x, S)
    inputs = xs._reinterpret(DTYPE, [S.staged, S.split, S.width], S.plain(2))
    acc = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)
    for step in range(S.iterations):
        async_copy.wait_group(S.stages - 2)
        taken = take(ring, step, S)
        nxt = step + S.stages - 1
        ask(ring, nxt, tile, w, e64, S)
        async_copy.commit_group()
        acc = add(acc, taken, one_row(inputs.index(step), S), sums, step, None, S)
    n, h = intermediate(gl.sum(acc, 0), expert, tile, b13_ptr, ACTIVATION, LIMIT, ALPHA, S)
    # all columns are the same row: the first is stored
    column = gl.arange(0, S.bm, gl.SliceLayout(0, S.out))
    pointers = (
        h_ptr + row.to(gl.int64) * S.columns + gl.expand_dims(n, 1) + gl.expand_dims(column, 0)
    )
    mask = gl.expand_dims(n < S.columns, 1) & gl.expand_dims(column == 0, 0)
    gl.store(pointers, h.to(DTYPE), mask=mask)
