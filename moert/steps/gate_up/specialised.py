"""Gate/up GEMM with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.activation.triton import activate
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.specialised.pipeline import block_and_tile, copy_tiles, make_ring, multiply_tile


@gluon.jit
def _finish(
    gate,
    up,
    column: gl.constexpr,
    rows,
    block,
    tile,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """Activate and store columns from `column` on of every warpgroup, [bm, warpgroups, columns]; a few at a
    time, for biases take as many registers as columns."""
    WIDTH: gl.constexpr = gate.shape[2]
    if WIDTH > 32:
        parts: gl.constexpr = (S.bm, gate.shape[1], 2, WIDTH // 2)
        gate_0, gate_1 = gl.split(gl.permute(gl.reshape(gate, parts), (0, 1, 3, 2)))
        up_0, up_1 = gl.split(gl.permute(gl.reshape(up, parts), (0, 1, 3, 2)))
        _finish(
            gate_0, up_0, column, rows, block, tile, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S
        )
        second: gl.constexpr = column + WIDTH // 2
        _finish(
            gate_1, up_1, second, rows, block, tile, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S
        )
    else:
        sorted_token_ids, sorted_expert_ids, _ = rows
        L: gl.constexpr = gate.type.layout
        group = gl.arange(0, gate.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))
        c = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(0, L)))
        start = tile * S.width + group * S.half + column
        n = gl.expand_dims(gl.expand_dims(start, 0), 2) + gl.expand_dims(gl.expand_dims(c, 0), 0)
        if b13_ptr is not None:
            expert = gl.load(sorted_expert_ids + block).to(gl.int64)
            bias = b13_ptr + expert * (S.columns * (2 if S.paired else 1))
            gate, up = add_bias(gate, up, bias, n, S.columns, S.paired, S.interleaved)
        h = activate(gate, up, ACTIVATION, S.paired, LIMIT, ALPHA)
        slots = block * S.bm + gl.arange(0, S.bm, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        packed = gl.expand_dims(gl.expand_dims(gl.load(sorted_token_ids + slots), 1), 2)
        row = ((packed & 0xFFFFFF) * K + (packed >> 24)).to(gl.int64)
        mask = ((packed >> 24) < K) & (n < S.columns)
        gl.store(h_ptr + row * S.columns + n, h.to(h_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(
    ring,
    rows,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    xs, ws, full, empty = ring
    _, _, blocks = rows
    it = 0
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        acc, it = multiply_tile(xs, ws, full, empty, it, S)
        if S.paired:
            halves = gl.reshape(acc, (S.bm, S.width // S.half, 2, S.half))
            gate, up = gl.split(gl.permute(halves, (0, 1, 3, 2)))
        else:
            gate = gl.reshape(acc, (S.bm, S.width // S.half, S.half))
            up = gate
        _finish(gate, up, 0, rows, block, tile, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)


@gluon.jit
def gate_up_specialised_kernel(
    x_ptr,
    x_stride,
    sorted_token_ids,
    sorted_expert_ids,
    num_valid_ids,
    w13_ptr,
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    ring = make_ring(h_ptr.dtype.element_ty, S)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    rows = (sorted_token_ids, sorted_expert_ids, gl.load(num_valid_ids) // S.bm)
    gl.warp_specialize(
        [
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)),
            (copy_tiles, (ring, rows, x_ptr, x_stride, w13_ptr, True, K, S)),
        ],
        [S.copy_warps],
        [S.copy_registers],
    )
