"""Down GEMM of tall blocks, 128 + 32 rows, with warps that copy and warps that multiply
(`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.specialised.pipeline import copy_tiles, first_column, make_ring
from moert.steps.specialised.tall_pipeline import multiply_tall_tile, split_slots
from moert.steps.specialised.transposed import each_tile, output_slots, store_results


@gluon.jit
def _finish(
    acc,
    first,
    start,
    sorted_token_ids,
    sorted_weights,
    bias_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """Weight and store sums [part_columns, N], output columns from `first` on, of the slots from `start` on;
    a few slots at a time, for their weights take as many registers."""
    N: gl.constexpr = acc.shape[1]
    if S.stored < N:
        acc_0, acc_1 = split_slots(acc)
        second = start + N // 2
        _finish(acc_0, first, start, sorted_token_ids, sorted_weights, bias_ptr, y_ptr, K, S)
        _finish(acc_1, first, second, sorted_token_ids, sorted_weights, bias_ptr, y_ptr, K, S)
    else:
        L: gl.constexpr = acc.type.layout
        if bias_ptr is not None:
            n = first + gl.arange(0, S.part_width, gl.SliceLayout(1, L))
            bias = gl.load(bias_ptr + n, mask=n < S.columns, other=0.0)
            acc += gl.expand_dims(bias.to(gl.float32), 1)
        weight = gl.load(sorted_weights + start + gl.arange(0, N, gl.SliceLayout(0, L)))
        acc *= gl.expand_dims(weight, 0)
        packed = output_slots(sorted_token_ids, start, N, S)
        store_results(acc, first, packed, y_ptr, K, S)


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
    sums, it = multiply_tall_tile(ring, it, PARTITION, N, S)
    bias_ptr = args[1]
    if args[1] is not None:
        bias_ptr = args[1] + gl.load(sorted_expert_ids + block).to(gl.int64) * S.columns
    first = first_column(tile, PARTITION, S)
    start = block * S.bm
    if S.first < N:
        second = start + S.first
        _finish(sums[1], first, second, sorted_token_ids, args[0], bias_ptr, args[2], K, S)
    _finish(sums[0], first, start, sorted_token_ids, args[0], bias_ptr, args[2], K, S)
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
def down_specialised_tall_kernel(
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
