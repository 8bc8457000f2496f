"""Down GEMM of int4 weights with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.specialised.int4_pipeline import (
    copy_int4_tiles,
    make_int4_ring,
    multiply_int4_tile,
)
from moert.steps.specialised.pipeline import block_and_tile
from moert.steps.specialised.transposed import output_slots, packed_beyond, store_results


@gluon.jit
def _one_tile(
    ring,
    it,
    rows,
    block,
    tile,
    sorted_weights,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    PARTITION: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
):
    """One tile of the first N rows of a block; returns the count of steps so far."""
    sorted_token_ids, sorted_expert_ids, _ = rows
    L: gl.constexpr = S.mma(N)
    if S.spare:
        packed = output_slots(sorted_token_ids, block * S.bm, N, S)
    acc, it = multiply_int4_tile(ring, it, PARTITION, N, S)
    if not S.spare:
        packed = output_slots(sorted_token_ids, block * S.bm, N, S)
    first = (tile * 2 + PARTITION) * S.width
    if b2_ptr is not None:
        expert = gl.load(sorted_expert_ids + block).to(gl.int64)
        n = first + gl.arange(0, S.width, gl.SliceLayout(1, L))
        b = gl.load(b2_ptr + expert * S.columns + n, mask=n < S.columns, other=0.0)
        acc += gl.expand_dims(b.to(gl.float32), 1)
    weight = gl.load(sorted_weights + block * S.bm + gl.arange(0, N, gl.SliceLayout(0, L)))
    y = acc * gl.expand_dims(weight, 0)
    store_results(y, first, packed, y_ptr, K, S)
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
    sorted_token_ids, _, blocks = rows
    it = 0
    beyond_half, beyond_quarter = packed_beyond(
        sorted_token_ids, gl.program_id(0), blocks, S.half, S.quarter, S
    )
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        if S.spare:
            # of the next tile, there when this one is done
            next_half, next_quarter = packed_beyond(
                sorted_token_ids, t + S.programs, blocks, S.half, S.quarter, S
            )
        if (beyond_half >> 24) < K:
            it = _one_tile(
                ring, it, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, PARTITION, S.bm, S
            )
        elif S.quarter == S.half:  # or the same code would be there twice
            it = _one_tile(
                ring, it, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, PARTITION, S.half, S
            )
        elif (beyond_quarter >> 24) < K:
            it = _one_tile(
                ring, it, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, PARTITION, S.half, S
            )
        else:
            it = _one_tile(
                ring, it, rows, block, tile, sorted_weights, b2_ptr, y_ptr, K, PARTITION, S.quarter, S
            )  # fmt: skip
        if not S.spare:
            next_half, next_quarter = packed_beyond(
                sorted_token_ids, t + S.programs, blocks, S.half, S.quarter, S
            )
        beyond_half, beyond_quarter = next_half, next_quarter


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
