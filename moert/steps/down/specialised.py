"""Down GEMM with warps that copy and warps that multiply (`moert/steps/specialised`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.specialised.pipeline import block_and_tile, copy_tiles, make_ring, multiply_tile


@gluon.jit
def _multiply(
    ring,
    rows,
    sorted_weights,
    b2_ptr,
    y_ptr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    xs, ws, full, empty = ring
    sorted_token_ids, sorted_expert_ids, blocks = rows
    L: gl.constexpr = S.mma
    it = 0
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        acc, it = multiply_tile(xs, ws, full, empty, it, S)
        n = tile * S.width + gl.arange(0, S.width, gl.SliceLayout(0, L))
        if b2_ptr is not None:
            expert = gl.load(sorted_expert_ids + block).to(gl.int64)
            b = gl.load(b2_ptr + expert * S.columns + n, mask=n < S.columns, other=0.0)
            acc += gl.expand_dims(b.to(gl.float32), 0)
        slots = block * S.bm + gl.arange(0, S.bm, gl.SliceLayout(1, L))
        packed = gl.load(sorted_token_ids + slots)
        weight = gl.load(sorted_weights + slots)
        y = (acc * gl.expand_dims(weight, 1)).to(y_ptr.dtype.element_ty)
        row = ((packed & 0xFFFFFF) * K + (packed >> 24)).to(gl.int64)
        mask = gl.expand_dims((packed >> 24) < K, 1) & gl.expand_dims(n < S.columns, 0)
        out = gl.expand_dims(y_ptr + row * S.columns, 1) + gl.expand_dims(n, 0)
        gl.store(out, y, mask=mask)


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
            (_multiply, (ring, rows, sorted_weights, b2_ptr, y_ptr, K, S)),
            (copy_tiles, (ring, rows, h_ptr, STRIDE, w2_ptr, False, K, S)),
        ],
        [S.copy_warps],
        [S.copy_registers],
    )
