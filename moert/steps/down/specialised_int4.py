"""Down GEMM of int4 weights with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.specialised.int4_pipeline import multiply_int4_tile
from moert.steps.specialised.int4_ring import copy_int4_tiles, make_int4_ring
from moert.steps.specialised.pipeline import first_column
from moert.steps.specialised.transposed import each_tile, output_slots, store_results


@gluon.jit
def finish(
    acc,
    first,
    packed,
    weights,
    bias_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """Weight and store sums [rows of weights, N], output columns from `first` on, of the packed slots [N].

    Args:
        weights: address of the weight of the first of them.
    """
    L: gl.constexpr = acc.type.layout
    if bias_ptr is not None:
        n = first + gl.arange(0, acc.shape[0], gl.SliceLayout(1, L))
        bias = gl.load(bias_ptr + n, mask=n < S.columns, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 1)
    weight = gl.load(weights + gl.arange(0, acc.shape[1], gl.SliceLayout(0, L)))
    store_results(acc * gl.expand_dims(weight, 0), first, packed, y_ptr, K, S)


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
    if S.spare:
        packed = output_slots(sorted_token_ids, block * S.bm, N, S)
    sums, it = multiply_int4_tile(ring, it, PARTITION, N, S)
    start = block * S.bm
    first = first_column(tile, PARTITION, S)
    bias_ptr = args[1]
    if args[1] is not None:
        bias_ptr = args[1] + gl.load(sorted_expert_ids + block).to(gl.int64) * S.columns
    weights = args[0] + start
    if S.first < N:
        packed = output_slots(sorted_token_ids, start + S.first, S.second, S)
        finish(sums[1], first, packed, weights + S.first, bias_ptr, args[2], K, S)
    if not S.spare:
        packed = output_slots(sorted_token_ids, start, sums[0].shape[1], S)
    finish(sums[0], first, packed, weights, bias_ptr, args[2], K, S)
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
def down_specialised_int4_kernel(
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
    ring = make_int4_ring(h_ptr.dtype.element_ty, S)
    blocks = gl.load(num_valid_ids) // S.bm
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    rows = (sorted_token_ids, sorted_expert_ids, blocks)
    w2 = (w2_ptr, scales_ptr, zeros_ptr)
    STRIDE: gl.constexpr = S.reduction
    gl.warp_specialize(
        [
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, 0, S)),
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, 1, S)),
            (copy_int4_tiles, (ring, rows, h_ptr, STRIDE, w2, False, K, S)),
        ],
        S.workers,
        S.registers,
    )
