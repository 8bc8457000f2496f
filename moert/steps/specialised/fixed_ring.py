"""The ring between the warps that copy and the partitions that multiply int4 weights by fixed-point rows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moert.steps.fixed_point.layout import STEP as _STEP
from moert.steps.specialised.fixed_shape import PARTITIONS as _PARTITIONS
from moert.steps.specialised.int4_ring import code_words
from moert.steps.specialised.pipeline import input_row
from moert.steps.specialised.transposed import piece

STEP = gl.constexpr(_STEP)
PARTITIONS = gl.constexpr(_PARTITIONS)


@gluon.jit
def make_fixed_ring(DTYPE: gl.constexpr, S: gl.constexpr):
    """Stages of rows with what their units are worth, of weights, and barriers.

    Args:
        DTYPE: of scales and zero points.

    Returns:
        The rows [stages, 2 * bm, 128], their worth and their sums [stages, bm], codes
        [stages * 2, row tiles, 32, 4], scales and zero points [stages, bn], full and empty.
    """
    STAGES: gl.constexpr = S.stages
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, 2 * S.bm, STEP], S.swizzled)
    worths = gl.allocate_shared_memory(gl.float32, [STAGES, S.bm], S.plain(1))
    codes = gl.allocate_shared_memory(gl.int32, [2 * STAGES, S.row_tiles, 32, 4], S.plain(3))
    scales = gl.allocate_shared_memory(DTYPE, [STAGES, S.bn], S.plain(1))
    sums = worths
    zeros = scales
    if S.zeros:
        sums = gl.allocate_shared_memory(gl.float32, [STAGES, S.bm], S.plain(1))
        zeros = gl.allocate_shared_memory(DTYPE, [STAGES, S.bn], S.plain(1))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # every copying thread says when its copies are done, every multiplying one when its products are
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=128 * PARTITIONS)
    return xs, worths, sums, codes, scales, zeros, full, empty


@gluon.jit
def _copy_tile(
    ring,
    it,
    inputs,
    packed,
    w,
    expert,
    tile,
    BY_TOKEN: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """Copy all steps of one tile into the ring, as places become empty; returns the count of steps so far.

    Args:
        it: steps copied before.
        inputs: rows, what their units are worth and their sums; w: codes, scales and zero points.
        packed: of `_tile_ids`.
    """
    xs, worths, sums, codes, scales, zeros, full, empty = ring
    planes_ptr, worth_ptr, sums_ptr = inputs
    codes_ptr, scales_ptr, zeros_ptr = w
    tile = tile * S.row_tiles
    # 32 bits within an expert: half the registers of pointers
    codes_ptr += expert * (S.all_tiles * S.row_blocks * 128)
    words, has_words = code_words(tile, S.row_tiles, S)
    r = gl.arange(0, S.bn, S.copy_values)
    value_tile = tile + r // 16
    before = expert * (S.all_tiles * S.groups * 16)
    offset = value_tile * (S.groups * 16) + r % 16
    has_values = value_tile < S.all_tiles
    x_packed, worth_packed = packed
    X: gl.constexpr = S.copies
    row, live = input_row(x_packed, BY_TOKEN, K)
    plane = gl.arange(0, 2 * S.bm, gl.SliceLayout(1, X)) % 2
    k = gl.arange(0, STEP, gl.SliceLayout(0, X))
    x_offsets = gl.expand_dims(row * (2 * S.padded) + plane * S.padded, 1) + gl.expand_dims(k, 0)
    x_live = gl.expand_dims(live, 1) & gl.expand_dims(k >= 0, 0)
    worth_row, worth_live = input_row(worth_packed, BY_TOKEN, K)
    worth_row *= S.steps
    for step in range(S.steps):
        slot = it % S.stages
        mbarrier.wait(empty.index(slot), ((it // S.stages) & 1) ^ 1)
        for half in gl.static_range(2):
            has_block = has_words
            if S.row_blocks % 2 != 0:
                has_block = has_words & (step * 2 + half < S.row_blocks)
            async_copy.async_copy_global_to_shared(
                codes.index(slot * 2 + half), codes_ptr + (step * 2 + half) * 128 + words, has_block
            )
        group = before + (step * STEP // S.group) * 16
        async_copy.async_copy_global_to_shared(
            scales.index(slot), scales_ptr + group + offset, has_values
        )
        async_copy.async_copy_global_to_shared(
            xs.index(slot), planes_ptr + step * STEP + x_offsets, x_live
        )
        async_copy.async_copy_global_to_shared(
            worths.index(slot), worth_ptr + step + worth_row, worth_live
        )
        if S.zeros:
            async_copy.async_copy_global_to_shared(
                zeros.index(slot), zeros_ptr + group + offset, has_values
            )
            async_copy.async_copy_global_to_shared(
                sums.index(slot), sums_ptr + step + worth_row, worth_live
            )
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        it += 1
    return it


@gluon.jit
def _tile_ids(sorted_token_ids, sorted_expert_ids, block, S: gl.constexpr):
    """A block's expert, and packed slots as rows [2 * bm] and their worth [bm] are copied."""
    start = sorted_token_ids + block * S.bm
    rows = gl.load(start + gl.arange(0, 2 * S.bm, gl.SliceLayout(1, S.copies)) // 2)
    worth = gl.load(start + gl.arange(0, S.bm, S.copy_worth))
    return gl.load(sorted_expert_ids + block), (rows, worth)


@gluon.jit
def copy_fixed_tiles(
    ring, rows, inputs, w, BY_TOKEN: gl.constexpr, K: gl.constexpr, S: gl.constexpr
):
    """What the copying warps do: all tiles of this program, one after the other.

    Args:
        ring: of `make_fixed_ring`; rows: sorted_token_ids, sorted_expert_ids and the number of live blocks.
        inputs: rows, what their units are worth and their sums; w: codes, scales and zero points.
        BY_TOKEN: a row for each token, else one for each slot of a token.
    """
    sorted_token_ids, sorted_expert_ids, blocks = rows
    it = 0
    block, next_tile = piece(gl.program_id(0), blocks, S)
    next_expert, next_packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        tile, expert, packed = next_tile, next_expert, next_packed
        # there when this tile's steps are copied
        block, next_tile = piece(t + S.programs, blocks, S)
        next_expert, next_packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
        it = _copy_tile(ring, it, inputs, packed, w, expert.to(gl.int64), tile, BY_TOKEN, K, S)
