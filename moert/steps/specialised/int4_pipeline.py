"""The ring between the warps that copy and the two warpgroups that widen and multiply int4 weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moert.steps.specialised.int4_widen import block_words, scaled_weights, step_values
from moert.steps.specialised.pipeline import (
    await_copies,
    block_and_tile,
    give_back,
    packed_rows,
)
from moert.steps.specialised.transposed import piece


@gluon.jit
def make_int4_ring(DTYPE: gl.constexpr, S: gl.constexpr):
    """Stages of rows, codes, scales and zero points, and barriers that say which are full, which empty."""
    STAGES: gl.constexpr = S.stages
    BLOCKS: gl.constexpr = S.stages * S.halves
    xs = gl.allocate_shared_memory(DTYPE, [BLOCKS, S.bm, 64], S.swizzled)
    codes = gl.allocate_shared_memory(gl.int32, [BLOCKS, 2 * S.row_tiles, 32, 4], S.plain(3))
    scales = gl.allocate_shared_memory(DTYPE, [STAGES, S.step_groups, 32 * S.row_tiles], S.plain(2))
    zeros = scales
    if S.zeros:
        zeros = gl.allocate_shared_memory(
            DTYPE, [STAGES, S.step_groups, 32 * S.row_tiles], S.plain(2)
        )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # every copying thread says when its copies are done, every multiplying one when its products are
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=64 * S.warps)
    return xs, codes, scales, zeros, full, empty


@gluon.jit
def _copy_tile(
    ring, it, x_ptr, x_rows, live, codes_ptr, scales_ptr, zeros_ptr, expert, tile, S: gl.constexpr
):
    """Copy all steps of one tile into the ring, as places become empty; returns the count of steps so far.

    Args:
        it: steps copied before.
        x_rows, live: [bm] offsets of the rows of inputs, and whether they are read (S.copies rows).
        tile: first row tile.
    """
    xs, codes, scales, zeros, full, empty = ring
    C: gl.constexpr = S.copy_codes
    t = tile + gl.arange(0, 2 * S.row_tiles, gl.SliceLayout(1, gl.SliceLayout(2, C)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, C)))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, C)))
    inner = gl.expand_dims(gl.expand_dims(lane * 4, 0), 2) + gl.expand_dims(
        gl.expand_dims(word, 0), 0
    )
    # 32 bits within an expert: half the registers of pointers
    codes_ptr += expert * (S.all_tiles * S.row_blocks * 128)
    words = gl.expand_dims(gl.expand_dims(t * (S.row_blocks * 128), 1), 2) + inner
    has_words = gl.expand_dims(gl.expand_dims(t < S.all_tiles, 1), 2) & (inner >= 0)
    V: gl.constexpr = S.copy_values
    part = gl.arange(0, S.step_groups, gl.SliceLayout(1, V))
    r = gl.arange(0, 32 * S.row_tiles, gl.SliceLayout(0, V))
    value_tile = tile + r // 16
    before = expert * (S.all_tiles * S.groups * 16)
    offset = value_tile * (S.groups * 16) + r % 16
    offset = gl.expand_dims(offset, 0) + gl.expand_dims(part * 16, 1)
    has_tile = gl.expand_dims(value_tile < S.all_tiles, 0)
    X: gl.constexpr = S.copies
    k = gl.arange(0, 64, gl.SliceLayout(0, X))
    x = gl.expand_dims(x_rows, 1) + gl.expand_dims(k, 0)
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
            has_rows = gl.expand_dims(live, 1)
            if S.reduction % S.step != 0:
                has_rows = has_rows & gl.expand_dims(
                    k < S.reduction - (step * S.halves + half) * 64, 0
                )
            async_copy.async_copy_global_to_shared(
                xs.index(slot * S.halves + half),
                x_ptr + (step * S.halves + half) * 64 + x,
                has_rows,
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
    codes_ptr, scales_ptr, zeros_ptr = w
    it = 0
    if S.spare:
        block, next_tile = piece(gl.program_id(0), blocks, S)
        next_expert, next_packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
        for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
            tile, expert, packed = next_tile, next_expert, next_packed
            # there when this tile's steps are copied
            block, next_tile = piece(t + S.programs, blocks, S)
            next_expert, next_packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
            x_rows, live = packed_rows(packed, x_stride, BY_TOKEN, K)
            it = _copy_tile(
                ring, it, x_ptr, x_rows, live, codes_ptr, scales_ptr, zeros_ptr,
                expert.to(gl.int64), tile * (2 * S.row_tiles), S,
            )  # fmt: skip
    else:
        for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
            block, tile = block_and_tile(t, blocks, S)
            expert, packed = _tile_ids(sorted_token_ids, sorted_expert_ids, block, S)
            x_rows, live = packed_rows(packed, x_stride, BY_TOKEN, K)
            it = _copy_tile(
                ring, it, x_ptr, x_rows, live, codes_ptr, scales_ptr, zeros_ptr,
                expert.to(gl.int64), tile * (2 * S.row_tiles), S,
            )  # fmt: skip


@gluon.jit
def _pin_arithmetic():
    """A branch never taken: ptxas moves arithmetic below a wait for the matrix unit, but past no branch."""
    gl.inline_asm_elementwise(
        "{ .reg .pred never; mov.u32 $0, %nctaid.z; setp.eq.u32 never, $0, 77777; "
        "again: @never nanosleep.u32 20; @never bra again; }",
        "=r",
        [],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def _words(ring, it, HALF: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr):
    """This partition's codes of a block of step `it`."""
    _, codes, _, _, _, _ = ring
    block = codes.index((it % S.stages) * S.halves + HALF)
    return block_words(block.slice(PARTITION * S.row_tiles, S.row_tiles, 0).load(S.codes), S)


@gluon.jit
def _values(ring, it, words, HALF: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr):
    """Scales and offsets of a block of step `it`, or of both where they share a group."""
    xs, _, scales, zeros, _, _ = ring
    GROUPS: gl.constexpr = S.stages * S.step_groups * 2
    by_tile = scales._reinterpret(scales.dtype, [GROUPS, S.row_tiles, 16], S.plain(2))
    zeros_by_tile = zeros._reinterpret(scales.dtype, [GROUPS, S.row_tiles, 16], S.plain(2))
    FIRST: gl.constexpr = 2 * S.parts * HALF + PARTITION
    at = (it % S.stages) * (S.step_groups * 2) + FIRST
    return step_values(by_tile, zeros_by_tile, at, words, xs.dtype, S)


@gluon.jit
def _first_weights(ring, it, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """This partition's weights of the first block of step `it`, once they are there, and their values."""
    xs, _, _, _, _, _ = ring
    await_copies(ring, it, S)
    words = _words(ring, it, 0, PARTITION, S)
    values = _values(ring, it, words, 0, PARTITION, S)
    return scaled_weights(words, values, xs.dtype, N, S), values


@gluon.jit
def _second_weights(ring, it, values, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """Of the second block; values: of the first."""
    xs, _, _, _, _, _ = ring
    words = _words(ring, it, 1, PARTITION, S)
    if S.step_groups > 1:
        values = _values(ring, it, words, 1, PARTITION, S)
    return scaled_weights(words, values, xs.dtype, N, S)


@gluon.jit
def _ask(ring, it, w, acc, HALF: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """acc + w x^T of a block of step `it`, under way when this returns."""
    xs, _, _, _, _, _ = ring
    x = xs.index((it % S.stages) * S.halves + HALF).slice(0, N, 0).permute((1, 0))
    return warpgroup_mma(w, x, acc, is_async=True)


@gluon.jit
def _done(w, acc, N: gl.constexpr, S: gl.constexpr):
    """The sum of what is under way; where steps are long and registers last, once the weights that were
    widened meanwhile are in registers. Elsewhere the partitions work in turns, and no more."""
    if N < 128 and S.halves == 2:
        _pin_arithmetic()
    # w too: its registers are read until then
    acc, w = warpgroup_mma_wait(0, deps=[acc, w])
    return acc


@gluon.jit
def _multiply_single(ring, it, acc, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """`multiply_int4_tile` where a step is one block."""
    even, _ = _first_weights(ring, it, PARTITION, N, S)
    for _ in range((S.steps - 1) // 2):
        acc = _ask(ring, it, even, acc, 0, N, S)
        odd, _ = _first_weights(ring, it + 1, PARTITION, N, S)
        acc = _done(even, acc, N, S)
        give_back(ring, it, S)
        acc = _ask(ring, it + 1, odd, acc, 0, N, S)
        even, _ = _first_weights(ring, it + 2, PARTITION, N, S)
        acc = _done(odd, acc, N, S)
        give_back(ring, it + 1, S)
        it += 2
    acc = _ask(ring, it, even, acc, 0, N, S)
    if S.steps % 2 == 0:
        odd, _ = _first_weights(ring, it + 1, PARTITION, N, S)
        acc = _done(even, acc, N, S)
        give_back(ring, it, S)
        acc = _ask(ring, it + 1, odd, acc, 0, N, S)
        acc = _done(odd, acc, N, S)
        give_back(ring, it + 1, S)
        it += 2
    else:
        acc = _done(even, acc, N, S)
        give_back(ring, it, S)
        it += 1
    return acc, it


@gluon.jit
def _multiply_double(ring, it, acc, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """`multiply_int4_tile` where a step is two blocks."""
    even, values = _first_weights(ring, it, PARTITION, N, S)
    for _ in range(S.steps - 1):
        acc = _ask(ring, it, even, acc, 0, N, S)
        odd = _second_weights(ring, it, values, PARTITION, N, S)
        acc = _done(even, acc, N, S)
        acc = _ask(ring, it, odd, acc, 1, N, S)
        even, values = _first_weights(ring, it + 1, PARTITION, N, S)
        acc = _done(odd, acc, N, S)
        give_back(ring, it, S)
        it += 1
    acc = _ask(ring, it, even, acc, 0, N, S)
    odd = _second_weights(ring, it, values, PARTITION, N, S)
    acc = _done(even, acc, N, S)
    acc = _ask(ring, it, odd, acc, 1, N, S)
    acc = _done(odd, acc, N, S)
    give_back(ring, it, S)
    return acc, it + 1


@gluon.jit
def multiply_int4_tile(ring, it, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """w x^T [row_tiles * 16, N] fp32 of this partition's half of a tile, and the count of steps so far.

    The weights of a block are widened while the matrix unit works on those of the block before, two blocks an
    iteration: see the package's docstring.
    """
    acc = gl.full([S.row_tiles * 16, N], 0, gl.float32, S.mma(N))
    if S.halves == 2:
        acc, it = _multiply_double(ring, it, acc, PARTITION, N, S)
    else:
        acc, it = _multiply_single(ring, it, acc, PARTITION, N, S)
    return acc, it
