"""Gate/up GEMM of int4 weights with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.activation.triton import activate
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.triton import add_bias
from moert.steps.specialised.int4_pipeline import multiply_int4_tile
from moert.steps.specialised.int4_ring import copy_int4_tiles, make_int4_ring
from moert.steps.specialised.pipeline import block_and_tile, first_column
from moert.steps.specialised.transposed import (
    gate_and_up,
    output_slots,
    packed_beyond,
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
    b13_ptr,
    h_ptr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    PARTITION: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
):
    """One tile of the first N rows of a block; returns the count of steps so far."""
    sorted_token_ids, sorted_expert_ids, _ = rows
    if S.spare:
        packed = output_slots(sorted_token_ids, block * S.bm, N, S)
    sums, it = multiply_int4_tile(ring, it, PARTITION, N, S)
    start = block * S.bm
    first = first_column(tile, PARTITION, S)
    bias_ptr = b13_ptr
    if b13_ptr is not None:
        expert = gl.load(sorted_expert_ids + block).to(gl.int64)
        bias_ptr = b13_ptr + expert * (S.columns * (2 if S.paired else 1))
    if S.first < N:
        packed = output_slots(sorted_token_ids, start + S.first, S.second, S)
        finish(sums[1], first, packed, bias_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)
    if not S.spare:
        packed = output_slots(sorted_token_ids, start, sums[0].shape[1], S)
    finish(sums[0], first, packed, bias_ptr, h_ptr, K, ACTIVATION, LIMIT, ALPHA, S)
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
    sorted_token_ids, _, blocks = rows
    it = 0
    beyond_fewer, beyond_fewest = packed_beyond(
        sorted_token_ids, gl.program_id(0), blocks, S.fewer, S.fewest, S
    )
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        if S.spare:
            # of the next tile, there when this one is done
            next_fewer, next_fewest = packed_beyond(
                sorted_token_ids, t + S.programs, blocks, S.fewer, S.fewest, S
            )
        if (beyond_fewer >> 24) < K:
            it = _one_tile(
                ring, it, rows, block, tile, b13_ptr, h_ptr,
                K, ACTIVATION, LIMIT, ALPHA, PARTITION, S.bm, S,
            )  # fmt: skip
        elif S.fewest == S.fewer:  # or the same code would be there twice
            it = _one_tile(
                ring, it, rows, block, tile, b13_ptr, h_ptr,
                K, ACTIVATION, LIMIT, ALPHA, PARTITION, S.fewer, S,
            )  # fmt: skip
        elif (beyond_fewest >> 24) < K:
            it = _one_tile(
                ring, it, rows, block, tile, b13_ptr, h_ptr,
                K, ACTIVATION, LIMIT, ALPHA, PARTITION, S.fewer, S,
            )  # fmt: skip
        else:
            it = _one_tile(
                ring, it, rows, block, tile, b13_ptr, h_ptr,
                K, ACTIVATION, LIMIT, ALPHA, PARTITION, S.fewest, S,
            )  # fmt: skip
        if not S.spare:
            next_fewer, next_fewest = packed_beyond(
                sorted_token_ids, t + S.programs, blocks, S.fewer, S.fewest, S
            )
        beyond_fewer, beyond_fewest = next_fewer, next_fewest


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
