"""Gate/up GEMM with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.activation.triton import activate
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.specialised.pipeline import (
    block_and_tile,
    copy_tiles,
    first_column,
    make_ring,
    multiply_tile,
    part_values,
    store_part,
)


@gluon.jit
def _finish(
    gate,
    up,
    first,
    packed,
    bias_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """Activate and store output columns from `first` on, [part_rows, columns]; a few at a time, for biases
    take as many registers as columns."""
    WIDTH: gl.constexpr = gate.shape[1]
    if S.stored < WIDTH:
        parts: gl.constexpr = (S.part_rows, 2, WIDTH // 2)
        gate_0, gate_1 = gl.split(gl.permute(gl.reshape(gate, parts), (0, 2, 1)))
        up_0, up_1 = gl.split(gl.permute(gl.reshape(up, parts), (0, 2, 1)))
        _finish(gate_0, up_0, first, packed, bias_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)
        second = first + WIDTH // 2
        _finish(gate_1, up_1, second, packed, bias_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)
    else:
        if bias_ptr is not None:
            n = first + gl.arange(0, WIDTH, gl.SliceLayout(0, gate.type.layout))
            n = gl.expand_dims(n, 0)
            gate, up = add_bias(gate, up, bias_ptr, n, S.columns, S.paired, S.interleaved)
        h = activate(gate, up, ACTIVATION, S.paired, LIMIT, ALPHA)
        store_part(h, first, packed, h_ptr, K, S)


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
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    sorted_token_ids, sorted_expert_ids, blocks = rows
    OUT: gl.constexpr = S.out
    it = 0
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        packed = part_values(sorted_token_ids, block, OUT, PARTITION, S)
        acc, it = multiply_tile(ring, it, PARTITION, S)
        if S.paired:
            halves = gl.reshape(acc, (S.part_rows, 2, S.part_width))
            gate, up = gl.split(gl.permute(halves, (0, 2, 1)))
        else:
            gate = acc
            up = acc
        bias_ptr = b13_ptr
        if b13_ptr is not None:
            expert = gl.load(sorted_expert_ids + block).to(gl.int64)
            bias_ptr = b13_ptr + expert * (S.columns * (2 if S.paired else 1))
        first = first_column(tile, PARTITION, S)
        _finish(gate, up, first, packed, bias_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)


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
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, 0, S)),
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, 1, S)),
            (copy_tiles, (ring, rows, x_ptr, x_stride, w13_ptr, True, K, S)),
        ],
        S.workers,
        S.registers,
    )
