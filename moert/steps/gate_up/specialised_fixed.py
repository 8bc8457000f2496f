"""Gate/up GEMM of int4 weights and fixed-point inputs (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.specialised_int4 import finish
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
        args: biases, h, and what `activate` is compiled for.
    """
    sorted_token_ids, sorted_expert_ids, _ = rows
    sums, it = multiply_fixed_tile(ring, it, PARTITION, N, S)
    start = block * S.bm
    first = first_column(tile, PARTITION, S)
    bias_ptr = args[0]
    if args[0] is not None:
        expert = gl.load(sorted_expert_ids + block).to(gl.int64)
        bias_ptr = args[0] + expert * (S.columns * (2 if S.paired else 1))
    packed = output_slots(sorted_token_ids, start, N, S)
    for part in gl.static_range(PIECES):
        column = first + part * S.piece_width
        finish(sums[part], column, packed, bias_ptr, args[1], K, args[2], args[3], args[4], S)
    return it


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
    each_tile(_one_tile, ring, rows, (b13_ptr, h_ptr, ACTIVATION, LIMIT, ALPHA), K, PARTITION, S)


@gluon.jit
def gate_up_specialised_fixed_kernel(
    planes_ptr,
    worth_ptr,
    sums_ptr,
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
    ring = make_fixed_ring(h_ptr.dtype.element_ty, S)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    blocks = gl.load(num_valid_ids) // S.bm
    rows = (sorted_token_ids, sorted_expert_ids, blocks)
    inputs = (planes_ptr, worth_ptr, sums_ptr)
    w13 = (w13_ptr, scales_ptr, zeros_ptr)
    gl.warp_specialize(
        [
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, 0, S)),
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, 1, S)),
            (copy_fixed_tiles, (ring, rows, inputs, w13, True, K, S)),
        ],
        S.workers,
        S.registers,
    )
