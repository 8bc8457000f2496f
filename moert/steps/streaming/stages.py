"""The ring of stages: what is asked for, and what is taken out of it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.streaming.copies import copy_codes, copy_matrix, copy_values


@gluon.jit
def rings(DTYPE: gl.constexpr, S: gl.constexpr):
    """Shared memory for S.stages stages of weights, scales and zero points."""
    if S.int4:
        blocks: gl.constexpr = S.row_tiles * S.blocks
        weights = gl.allocate_shared_memory(
            gl.int32, [S.stages, S.split, blocks, 32, 4], S.plain(4)
        )
        scales = gl.allocate_shared_memory(DTYPE, [S.stages, S.parts * S.split, S.rows], S.plain(2))
        zeros = scales
        if S.zeros:
            zeros = gl.allocate_shared_memory(
                DTYPE, [S.stages, S.parts * S.split, S.rows], S.plain(2)
            )
    else:
        weights = gl.allocate_shared_memory(DTYPE, [S.stages, S.split, S.rows, S.width], S.swizzled)
        scales = weights
        zeros = weights
    return weights, scales, zeros


@gluon.jit
def input_ring(DTYPE: gl.constexpr, S: gl.constexpr):
    """Shared memory for as many stages of rows: of the most blocks that a program takes together."""
    return gl.allocate_shared_memory(
        DTYPE, [S.stages, S.split, S.bm * S.together, S.width], S.swizzled
    )


@gluon.jit
def ask(ring, it, tile, w, expert, S: gl.constexpr):
    """Ask for the weights of iteration `it` of one expert: row tiles from `tile` on, S.steps each.

    Args:
        ring: of `rings`.
        w: pointers to weights or codes, scales and zero points.
    """
    weights, scales, zeros = ring
    w_ptr, scales_ptr, zeros_ptr = w
    slot = it % S.stages
    tile = tile + (it // S.steps) * S.row_tiles
    inside = it < S.iterations
    if S.int4:
        CODES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, S.codes)))
        first = ((it % S.steps) * S.split + gl.arange(0, S.split, CODES)) * S.blocks
        live = (first >= 0) & inside
        copy_codes(weights.index(slot), w_ptr, expert, tile, first, live, S)
        q = gl.arange(0, S.parts * S.split, gl.SliceLayout(1, S.values))
        first = ((it % S.steps) * S.split + q % S.split) * S.blocks
        live = (first >= 0) & inside
        copy_values(scales.index(slot), scales_ptr, expert, tile, first, live, S)
        if S.zeros:
            copy_values(zeros.index(slot), zeros_ptr, expert, tile, first, live, S)
    else:
        MATRIX: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, S.matrix))
        first = ((it % S.steps) * S.split + gl.arange(0, S.split, MATRIX)) * S.blocks
        live = (first >= 0) & inside
        copy_matrix(weights.index(slot), w_ptr, expert, tile, first, live, S)


@gluon.jit
def ask_by_slot(ring, it, tile, w, experts, S: gl.constexpr):
    """`ask` where a program goes through a token's slots, S.steps parts of a slot at a time.

    Args:
        ring, w: as for `ask`.
        experts: [asked, parts * split] int32 in shared memory, the expert of each part; -1 asks for nothing.
    """
    weights, scales, zeros = ring
    w_ptr, scales_ptr, zeros_ptr = w
    slot = it % S.stages
    if S.int4:
        CODES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, S.codes)))
        expert = experts.index(it).slice(0, S.split).load(CODES)
        first = ((it * S.split + gl.arange(0, S.split, CODES)) % S.steps) * S.blocks
        copy_codes(weights.index(slot), w_ptr, expert.to(gl.int64), tile, first, expert >= 0, S)
        VALUES: gl.constexpr = gl.SliceLayout(1, S.values)
        expert = experts.index(it).load(VALUES)
        q = gl.arange(0, S.parts * S.split, VALUES)
        first = ((it * S.split + q % S.split) % S.steps) * S.blocks
        e64 = expert.to(gl.int64)
        copy_values(scales.index(slot), scales_ptr, e64, tile, first, expert >= 0, S)
        if S.zeros:
            copy_values(zeros.index(slot), zeros_ptr, e64, tile, first, expert >= 0, S)
    else:
        MATRIX: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, S.matrix))
        expert = experts.index(it).slice(0, S.split).load(MATRIX)
        first = ((it * S.split + gl.arange(0, S.split, MATRIX)) % S.steps) * S.blocks
        copy_matrix(weights.index(slot), w_ptr, expert.to(gl.int64), tile, first, expert >= 0, S)


@gluon.jit
def group_values(ring, slot, part: gl.constexpr, S: gl.constexpr):
    """Scales or zero points [parts * split, rows] of a stage: those of one group [split, rows]."""
    by_part = ring._reinterpret(ring.dtype, [S.stages * S.parts, S.split, S.rows], S.plain(2))
    return by_part.index(slot * S.parts + part).load(S.acc_rows)


@gluon.jit
def take(ring, it, S: gl.constexpr):
    """A stage in registers, before its place in the ring is given to another: weights, then scales and zero
    points, each a tuple with one for every group."""
    weights, scales, zeros = ring
    slot = it % S.stages
    PARTS: gl.constexpr = S.parts
    scale = ()
    zero = ()
    if S.int4:
        w = weights.index(slot).load(S.codes)
        for part in gl.static_range(PARTS):
            scale = scale + (group_values(scales, slot, part, S),)  # type: ignore[assignment]
            if S.zeros:
                zero = zero + (group_values(zeros, slot, part, S),)  # type: ignore[assignment]
    else:
        w = weights.index(slot).load(S.a)
    return w, scale, zero
