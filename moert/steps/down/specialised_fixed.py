"""Down GEMM of int4 weights and fixed-point inputs (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.down.specialised_int4 import finish
from moert.steps.specialised.fixed_pipeline import multiply_fixed_tile
from moert.steps.specialised.fixed_ring import copy_fixed_tiles, make_fixed_ring
from moert.steps.specialised.fixed_shape import PIECES as _PIECES
from moert.steps.specialised.pipeline import first_column
from moert.steps.specialised.transposed import each_tile, output_slots

PIECES = gl.constexpr(_PIECES)


@gluon.jit
def _one_tile(
    ring,
    it,
    rows,
    block,
    tile,
    args,
    K: gl.constexpr,
    PARTITION: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
):
    """One tile of the first N rows of a block; returns the count of steps so far.

    Args:
        args: the routing weights of the sorted slots, biases, and y.
    """
    sorted_token_ids, sorted_expert_ids, _ = rows
    sums, it = multiply_fixed_tile(ring, it, PARTITION, N, S)
    start = block * S.bm
    first = first_column(tile, PARTITION, S)
    bias_ptr = args[1]
    if args[1] is not None:
        bias_ptr = args[1] + gl.load(sorted_expert_ids + block).to(gl.int64) * S.columns
    weights = args[0] + start
    packed = output_slots(sorted_token_ids, start, N, S)
    for part in gl.static_range(PIECES):
        column = first + part * S.piece_width
        finish(sums[part], column, packed, weights, bias_ptr, args[2], K, S)
    return it


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
    each_tile(_one_tile, ring, rows, (sorted_weights, b2_ptr, y_ptr), K, PARTITION, S)


@gluon.jit
def down_specialised_fixed_kernel(
    sorted_token_ids,
    sorted_weights,
    sorted_expert_ids,
    num_valid_ids,
    planes_ptr,
    worth_ptr,
    sums_ptr,
    w2_ptr,
    scales_ptr,
    zeros_ptr,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    ring = make_fixed_ring(y_ptr.dtype.element_ty, S)
    blocks = gl.load(num_valid_ids) // S.bm
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    rows = (sorted_token_ids, sorted_expert_ids, blocks)
    inputs = (planes_ptr, worth_ptr, sums_ptr)
    w2 = (w2_ptr, scales_ptr, zeros_ptr)
    gl.warp_specialize(
        [
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, 0, S)),
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, 1, S)),
            (copy_fixed_tiles, (ring, rows, inputs, w2, False, K, S)),
        ],
        S.workers,
        S.registers,
    )
