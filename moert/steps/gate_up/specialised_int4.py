"""Gate/up GEMM of int4 weights with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.activation.triton import activate
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.specialised.int4_pipeline import multiply_int4_tile
from moert.steps.specialised.int4_ring import copy_int4_tiles, make_int4_ring
from moert.steps.specialised.pipeline import first_column
from moert.steps.specialised.transposed import (
    each_tile,
    gate_and_up,
    output_slots,
    store_results,
)


@gluon.jit
def finish(
    acc,
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
    """Activate and store sums [rows of weights, N], output columns from `first`, of the packed slots [N]."""
    gate, up = gate_and_up(acc, S)
    if bias_ptr is not None:
        n = first + gl.arange(0, gate.shape[0], gl.SliceLayout(1, gate.type.layout))
        n = gl.expand_dims(n, 1)
        gate, up = add_bias(gate, up, bias_ptr, n, S.columns, S.paired, False)
    h = activate(gate, up, ACTIVATION, S.paired, LIMIT, ALPHA)
    store_results(h, first, packed, h_ptr, K, S)


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
    if S.spare:
        packed = output_slots(sorted_token_ids, block * S.bm, N, S)
    sums, it = multiply_int4_tile(ring, it, PARTITION, N, S)
    start = block * S.bm
    first = first_column(tile, PARTITION, S)
    bias_ptr = args[0]
    if args[0] is not None:
        expert = gl.load(sorted_expert_ids + block).to(gl.int64)
        bias_ptr = args[0] + expert * (S.columns * (2 if S.paired else 1))
    if S.first < N:
        packed = output_slots(sorted_token_ids, start + S.first, S.second, S)
        finish(sums[1], first, packed, bias_ptr, args[1], K, args[2], args[3], args[4], S)
    if not S.spare:
        packed = output_slots(sorted_token_ids, start, sums[0].shape[1], S)
    finish(sums[0], first, packed, bias_ptr, args[1], K, args[2], args[3], args[4], S)
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
def gate_up_specialised_int4_kernel(
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
    ring = make_int4_ring(h_ptr.dtype.element_ty, S)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    blocks = gl.load(num_valid_ids) // S.bm
    rows = (sorted_token_ids, sorted_expert_ids, blocks)
    w13 = (w13_ptr, scales_ptr, zeros_ptr)
    gl.warp_specialize(
        [
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, 0, S)),
            (_multiply, (ring, rows, b13_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, 1, S)),
            (copy_int4_tiles, (ring, rows, x_ptr, x_stride, w13, True, K, S)),
        ],
        S.workers,
        S.registers,
    )
