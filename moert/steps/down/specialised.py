"""Down GEMM with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
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
def _finish(acc, first, packed, weight, bias_ptr, y_ptr, K: gl.constexpr, S: gl.constexpr):
    """Weight and store output columns from `first` on, [part_rows, columns]; a few at a time, for biases take
    as many registers as columns."""
    WIDTH: gl.constexpr = acc.shape[1]
    if S.stored < WIDTH:
        parts: gl.constexpr = (S.part_rows, 2, WIDTH // 2)
        acc_0, acc_1 = gl.split(gl.permute(gl.reshape(acc, parts), (0, 2, 1)))
        _finish(acc_0, first, packed, weight, bias_ptr, y_ptr, K, S)
        _finish(acc_1, first + WIDTH // 2, packed, weight, bias_ptr, y_ptr, K, S)
    else:
        L: gl.constexpr = acc.type.layout
        if bias_ptr is not None:
            n = first + gl.arange(0, WIDTH, gl.SliceLayout(0, L))
            bias = gl.load(bias_ptr + n, mask=n < S.columns, other=0.0)
            acc += gl.expand_dims(bias.to(gl.float32), 0)
        acc *= gl.expand_dims(gl.convert_layout(weight, gl.SliceLayout(1, L)), 1)
        store_part(acc, first, packed, y_ptr, K, S)


@gluon.jit
def _multiply(
    ring,
    rows,
    sorted_weights,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    sorted_token_ids, sorted_expert_ids, blocks = rows
    OUT: gl.constexpr = S.out
    MMA: gl.constexpr = S.mma
    it = 0
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        packed = part_values(sorted_token_ids, block, OUT, PARTITION, S)
        weight = part_values(sorted_weights, block, MMA, PARTITION, S)
        acc, it = multiply_tile(ring, it, PARTITION, S)
        bias_ptr = b2_ptr
        if b2_ptr is not None:
            bias_ptr = b2_ptr + gl.load(sorted_expert_ids + block).to(gl.int64) * S.columns
        first = first_column(tile, PARTITION, S)
        _finish(acc, first, packed, weight, bias_ptr, y_ptr, K, S)


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
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, 0, S)),
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, 1, S)),
            (copy_tiles, (ring, rows, h_ptr, STRIDE, w2_ptr, False, K, S)),
        ],
        S.workers,
        S.registers,
    )
