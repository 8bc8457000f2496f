"""Down GEMM with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.specialised.pipeline import block_and_tile, copy_tiles, make_ring, multiply_tile


@gluon.jit
def _finish(
    acc,
    column: gl.constexpr,
    rows,
    block,
    tile,
    sorted_weights,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """Weight and store columns from `column` on of every group, [bm, groups, columns]; a few at a time, for
    biases take as many registers as columns."""
    WIDTH: gl.constexpr = acc.shape[2]
    if WIDTH > 32:
        parts: gl.constexpr = (S.bm, acc.shape[1], 2, WIDTH // 2)
        first, second = gl.split(gl.permute(gl.reshape(acc, parts), (0, 1, 3, 2)))
        _finish(first, column, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, S)
        middle: gl.constexpr = column + WIDTH // 2
        _finish(second, middle, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, S)
    else:
        sorted_token_ids, sorted_expert_ids, _ = rows
        L: gl.constexpr = acc.type.layout
        group = gl.arange(0, acc.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))
        c = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(0, L)))
        start = tile * S.width + group * S.half + column
        n = gl.expand_dims(gl.expand_dims(start, 0), 2) + gl.expand_dims(gl.expand_dims(c, 0), 0)
        inside = n < S.columns
        if b2_ptr is not None:
            expert = gl.load(sorted_expert_ids + block).to(gl.int64)
            bias = gl.load(b2_ptr + expert * S.columns + n, mask=inside, other=0.0)
            acc += bias.to(gl.float32)
        slots = block * S.bm + gl.arange(0, S.bm, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        packed = gl.expand_dims(gl.expand_dims(gl.load(sorted_token_ids + slots), 1), 2)
        weight = gl.expand_dims(gl.expand_dims(gl.load(sorted_weights + slots), 1), 2)
        row = ((packed & 0xFFFFFF) * K + (packed >> 24)).to(gl.int64)
        y = (acc * weight).to(y_ptr.dtype.element_ty)
        gl.store(y_ptr + row * S.columns + n, y, mask=((packed >> 24) < K) & inside)


@gluon.jit
def _multiply(
    ring,
    rows,
    sorted_weights,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    xs, ws, full, empty = ring
    _, _, blocks = rows
    it = 0
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        acc, it = multiply_tile(xs, ws, full, empty, it, S)
        groups = gl.reshape(acc, (S.bm, S.width // S.half, S.half))
        _finish(groups, 0, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, S)


@gluon.jit
def down_specialised_kernel(
    sorted_token_ids,
    sorted_weights,
    sorted_expert_ids,
    num_valid_ids,
    h_ptr,
    w2_ptr,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    ring = make_ring(h_ptr.dtype.element_ty, S)
    rows = (sorted_token_ids, sorted_expert_ids, gl.load(num_valid_ids) // S.bm)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    STRIDE: gl.constexpr = S.reduction
    gl.warp_specialize(
        [
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, S)),
            (copy_tiles, (ring, rows, h_ptr, STRIDE, w2_ptr, False, K, S)),
        ],
        [S.copy_warps],
        [S.copy_registers],
    )
