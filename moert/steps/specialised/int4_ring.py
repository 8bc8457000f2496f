"""The ring between the warps that copy and the two partitions that widen and multiply int4 weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moert.steps.specialised.pipeline import block_and_tile, block_rows, packed_rows
from moert.steps.specialised.transposed import piece


@gluon.jit
def make_int4_ring(DTYPE: gl.constexpr, S: gl.constexpr):
    """Stages of rows, codes, scales and zero points, and barriers that say which are full, which empty.

    Returns:
        The rows [stages * halves, first, 64], where S.second those [stages * halves, second, 64], codes,
        scales, zero points, full and empty.
    """
    STAGES: gl.constexpr = S.stages
    BLOCKS: gl.constexpr = S.stages * S.halves
    xs = gl.allocate_shared_memory(DTYPE, [BLOCKS, S.first, 64], S.swizzled)
    codes = gl.allocate_shared_memory(gl.int32, [BLOCKS, 2 * S.row_tiles, 32, 4], S.plain(3))
    scales = gl.allocate_shared_memory(DTYPE, [STAGES, S.step_groups, S.bn], S.plain(2))
    zeros = scales
    if S.zeros:
        zeros = gl.allocate_shared_memory(DTYPE, [STAGES, S.step_groups, S.bn], S.plain(2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # every copying thread says when its copies are done, every multiplying one when its products are
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=64 * S.warps)
    ring = (xs, codes, scales, zeros, full, empty)
    if S.second:
        more = gl.allocate_shared_memory(DTYPE, [BLOCKS, S.second, 64], S.swizzled)
        ring = (xs, more, codes, scales, zeros, full, empty)  # type: ignore[assignment]
    return ring


@gluon.jit
def code_words(tile, TILES: gl.constexpr, S: gl.constexpr):
    """Offsets [TILES, 32, 4] within an expert of the first block's words of row tiles from `tile` on, and
    whether they are there."""
    C: gl.constexpr = S.copy_codes
    t = tile + gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, C)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, C)))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, C)))
    inner = gl.expand_dims(gl.expand_dims(lane * 4, 0), 2) + gl.expand_dims(
        gl.expand_dims(word, 0), 0
    )
    words = gl.expand_dims(gl.expand_dims(t * (S.row_blocks * 128), 1), 2) + inner
    return words, gl.expand_dims(gl.expand_dims(t < S.all_tiles, 1), 2) & (inner >= 0)


@gluon.jit
def _copy_tile(ring, it, x_ptr, x, w, expert, tile, S: gl.constexpr):
    """Copy all steps of one tile into the ring, as places become empty; returns the count of steps so far.

    Args:
        it: steps copied before.
        x: of each of the ring's places for rows, what `input_rows` says; w: as for `copy_int4_tiles`.
    """
    codes, scales, zeros, full, empty = ring[-5], ring[-4], ring[-3], ring[-2], ring[-1]
    codes_ptr, scales_ptr, zeros_ptr = w
    tile = tile * (2 * S.row_tiles)
    # 32 bits within an expert: half the registers of pointers
    codes_ptr += expert * (S.all_tiles * S.row_blocks * 128)
    words, has_words = code_words(tile, 2 * S.row_tiles, S)
    V: gl.constexpr = S.copy_values
    part = gl.arange(0, S.step_groups, gl.SliceLayout(1, V))
    r = gl.arange(0, S.bn, gl.SliceLayout(0, V))
    value_tile = tile + r // 16
    before = expert * (S.all_tiles * S.groups * 16)
    offset = value_tile * (S.groups * 16) + r % 16
    offset = gl.expand_dims(offset, 0) + gl.expand_dims(part * 16, 1)
    has_tile = gl.expand_dims(value_tile < S.all_tiles, 0)
    X: gl.constexpr = S.copies
    k = gl.arange(0, 64, gl.SliceLayout(0, X))
    PARTS: gl.constexpr = len(x)
    HALVES: gl.constexpr = S.halves
    for step in range(S.steps):
        slot = it % S.stages
        mbarrier.wait(empty.index(slot), ((it // S.stages) & 1) ^ 1)
        for half in gl.static_range(HALVES):
            has_block = has_words
            if S.row_blocks % S.halves != 0:
                has_block = has_words & (step * S.halves + half < S.row_blocks)
            async_copy.async_copy_global_to_shared(
                codes.index(slot * S.halves + half),
                codes_ptr + (step * S.halves + half) * 128 + words,
                has_block,
            )
        group = (step * S.step) // S.group
        has_values = has_tile & gl.expand_dims(group + part < S.groups, 1)
        async_copy.async_copy_global_to_shared(
            scales.index(slot), scales_ptr + (before + group * 16) + offset, has_values
        )
        if S.zeros:
            async_copy.async_copy_global_to_shared(
                zeros.index(slot), zeros_ptr + (before + group * 16) + offset, has_values
            )
        for half in gl.static_range(HALVES):
            for place in gl.static_range(PARTS):
                offsets, live = x[place]
                if S.reduction % S.step != 0:
                    live = live & gl.expand_dims(k < S.reduction - (step * S.halves + half) * 64, 0)
                async_copy.async_copy_global_to_shared(
                    ring[place].index(slot * S.halves + half),
                    x_ptr + (step * S.halves + half) * 64 + offsets,
                    live,
                )
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        it += 1
    return it


@gluon.jit
def _tile_ids(sorted_token_ids, sorted_expert_ids, block, S: gl.constexpr):
    """A block's expert and packed slots [bm]."""
    slots = block * S.bm + gl.arange(0, S.bm, gl.SliceLayout(1, S.copies))
    return gl.load(sorted_expert_ids + block), gl.load(sorted_token_ids + slots)


@gluon.jit
def copy_int4_tiles(
    ring,
    rows,
    x_ptr,
    x_stride,
    w,
    BY_TOKEN: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """As `pipeline.copy_tiles`; w: codes, scales and zero points."""
    sorted_token_ids, sorted_expert_ids, blocks = rows
    if S.second:
        # 0, which the compiler does not know: what it computes of arguments and the thread's number alone it
        # has before the partitions part, in registers of all of them
        x_ptr += (blocks >> 31) * 64
    it = 0
    if S.spare:
        block, next_tile = piece(gl.program_id(0), blocks, S)
        next_expert, next_packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
        for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
            tile, expert, packed = next_tile, next_expert, next_packed
            # there when this tile's steps are copied
            block, next_tile = piece(t + S.programs, blocks, S)
            next_expert, next_packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
            x = (packed_rows(packed, x_stride, BY_TOKEN, K, S),)
            it = _copy_tile(ring, it, x_ptr, x, w, expert.to(gl.int64), tile, S)
    else:
        for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
            block, tile = block_and_tile(t, blocks, S)
            expert = gl.load(sorted_expert_ids + block)
            x = block_rows(sorted_token_ids, block, x_stride, BY_TOKEN, K, S)
            it = _copy_tile(ring, it, x_ptr, x, w, expert.to(gl.int64), tile, S)
