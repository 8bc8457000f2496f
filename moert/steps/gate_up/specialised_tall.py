"""Gate/up GEMM of tall blocks, 128 + 32 rows, with warps that copy and warps that multiply
(`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.activation.triton import activate
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.specialised.pipeline import copy_tiles, first_column, make_ring
from moert.steps.specialised.tall_pipeline import multiply_tall_tile, split_slots
from moert.steps.specialised.transposed import (
    each_tile,
    gate_and_up,
    output_slots,
    store_results,
)


@gluon.jit
def _finish(
    gate,
    up,
    first,
    start,
    sorted_token_ids,
    bias_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """Activate and store [part_width, N], output columns from `first` on, of the slots from `start` on; as
    many slots at a time as in the down GEMM."""
    N: gl.constexpr = gate.shape[1]
    if S.stored < N:
        gate_0, gate_1 = split_slots(gate)
        up_0, up_1 = split_slots(up)
        _finish(
            gate_0, up_0, first, start, sorted_token_ids, bias_ptr, h_ptr,
            K, ACTIVATION, LIMIT, ALPHA, S,
        )  # fmt: skip
        _finish(
            gate_1, up_1, first, start + N // 2, sorted_token_ids, bias_ptr, h_ptr,
            K, ACTIVATION, LIMIT, ALPHA, S,
        )  # fmt: skip
    else:
        if bias_ptr is not None:
            n = first + gl.arange(0, S.part_width, gl.SliceLayout(1, gate.type.layout))
            n = gl.expand_dims(n, 1)
            gate, up = add_bias(gate, up, bias_ptr, n, S.columns, S.paired, S.interleaved)
        h = activate(gate, up, ACTIVATION, S.paired, LIMIT, ALPHA)
        packed = output_slots(sorted_token_ids, start, N, S)
        store_results(h, first, packed, h_ptr, K, S)


@gluon.jit
def _split_and_finish(
    acc,
    first,
    start,
    sorted_token_ids,
    bias_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
):
    """`_finish` of sums [part_columns, N]."""
    gate, up = gate_and_up(acc, S)
    _finish(
        gate, up, first, start, sorted_token_ids, bias_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S
    )


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
    sums, it = multiply_tall_tile(ring, it, PARTITION, N, S)
    bias_ptr = args[0]
    if args[0] is not None:
        expert = gl.load(sorted_expert_ids + block).to(gl.int64)
        bias_ptr = args[0] + expert * (S.columns * (2 if S.paired else 1))
    first = first_column(tile, PARTITION, S)
    start = block * S.bm
    if S.first < N:
        _split_and_finish(
            sums[1], first, start + S.first, sorted_token_ids, bias_ptr, args[1],
            K, args[2], args[3], args[4], S,
        )  # fmt: skip
    _split_and_finish(
        sums[0], first, start, sorted_token_ids, bias_ptr, args[1], K, args[2], args[3], args[4], S
    )
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
def gate_up_specialised_tall_kernel(
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
