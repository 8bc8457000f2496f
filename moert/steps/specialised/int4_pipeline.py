"""How a partition widens int4 weights and multiplies with them: one or two products of the same weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from moert.steps.dependent_launch import compute_before_wait
from moert.steps.specialised.int4_widen import block_words, scaled_weights, step_values
from moert.steps.specialised.pipeline import await_copies, give_back
from moert.steps.specialised.transposed import no_sums


@gluon.jit
def _words(ring, it, HALF: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr):
    """This partition's codes of a block of step `it`."""
    block = ring[-5].index((it % S.stages) * S.halves + HALF)
    return block_words(block.slice(PARTITION * S.row_tiles, S.row_tiles, 0).load(S.codes), S)


@gluon.jit
def _values(ring, it, words, HALF: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr):
    """Scales and offsets of a block of step `it`, or of both where they share a group."""
    scales, zeros = ring[-4], ring[-3]
    GROUPS: gl.constexpr = S.stages * S.step_groups * 2
    by_tile = scales._reinterpret(scales.dtype, [GROUPS, S.row_tiles, 16], S.plain(2))
    zeros_by_tile = zeros._reinterpret(scales.dtype, [GROUPS, S.row_tiles, 16], S.plain(2))
    FIRST: gl.constexpr = 2 * S.parts * HALF + PARTITION
    at = (it % S.stages) * (S.step_groups * 2) + FIRST
    return step_values(by_tile, zeros_by_tile, at, words, scales.dtype, S)


@gluon.jit
def _first_weights(ring, it, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """This partition's weights of the first block of step `it`, once they are there, and their values."""
    await_copies(ring, it, S)
    words = _words(ring, it, 0, PARTITION, S)
    values = _values(ring, it, words, 0, PARTITION, S)
    return scaled_weights(words, values, ring[0].dtype, N, S), values


@gluon.jit
def _second_weights(ring, it, values, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """Of the second block; values: of the first."""
    words = _words(ring, it, 1, PARTITION, S)
    if S.step_groups > 1:
        values = _values(ring, it, words, 1, PARTITION, S)
    return scaled_weights(words, values, ring[0].dtype, N, S)


@gluon.jit
def _ask(ring, it, w, sums, HALF: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """sums + w x^T of a block of step `it`, under way when this returns."""
    at = (it % S.stages) * S.halves + HALF
    if S.first < N:
        x, more = ring[0].index(at), ring[1].index(at)
        # the same registers
        again = gl.convert_layout(w, S.a(S.second), assert_trivial=True)
        sums = (
            warpgroup_mma(w, x.permute((1, 0)), sums[0], is_async=True),
            warpgroup_mma(again, more.permute((1, 0)), sums[1], is_async=True),
        )
    else:
        x = ring[0].index(at).slice(0, N, 0)
        sums = (warpgroup_mma(w, x.permute((1, 0)), sums[0], is_async=True),)
    return sums


@gluon.jit
def _done(w, sums, N: gl.constexpr, S: gl.constexpr):
    """The sums of what is under way; where steps are long and registers last, once the weights that were
    widened meanwhile are in registers. Elsewhere the partitions work in turns, and no more."""
    if S.pinned(N):
        compute_before_wait(True)
    # w too: its registers are read until then
    if len(sums) == 2:
        first, second, w = warpgroup_mma_wait(0, deps=[sums[0], sums[1], w])
        sums = (first, second)
    else:
        first, w = warpgroup_mma_wait(0, deps=[sums[0], w])
        sums = (first,)
    return sums


@gluon.jit
def _multiply_single(ring, it, sums, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """`multiply_int4_tile` where a step is one block."""
    even, _ = _first_weights(ring, it, PARTITION, N, S)
    for _ in range((S.steps - 1) // 2):
        sums = _ask(ring, it, even, sums, 0, N, S)
        odd, _ = _first_weights(ring, it + 1, PARTITION, N, S)
        sums = _done(even, sums, N, S)
        give_back(ring, it, S)
        sums = _ask(ring, it + 1, odd, sums, 0, N, S)
        even, _ = _first_weights(ring, it + 2, PARTITION, N, S)
        sums = _done(odd, sums, N, S)
        give_back(ring, it + 1, S)
        it += 2
    sums = _ask(ring, it, even, sums, 0, N, S)
    if S.steps % 2 == 0:
        odd, _ = _first_weights(ring, it + 1, PARTITION, N, S)
        sums = _done(even, sums, N, S)
        give_back(ring, it, S)
        sums = _ask(ring, it + 1, odd, sums, 0, N, S)
        sums = _done(odd, sums, N, S)
        give_back(ring, it + 1, S)
        it += 2
    else:
        sums = _done(even, sums, N, S)
        give_back(ring, it, S)
        it += 1
    return sums, it


@gluon.jit
def _multiply_double(ring, it, sums, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """`multiply_int4_tile` where a step is two blocks."""
    even, values = _first_weights(ring, it, PARTITION, N, S)
    for _ in range(S.steps - 1):
        sums = _ask(ring, it, even, sums, 0, N, S)
        odd = _second_weights(ring, it, values, PARTITION, N, S)
        sums = _done(even, sums, N, S)
        sums = _ask(ring, it, odd, sums, 1, N, S)
        even, values = _first_weights(ring, it + 1, PARTITION, N, S)
        sums = _done(odd, sums, N, S)
        give_back(ring, it, S)
        it += 1
    sums = _ask(ring, it, even, sums, 0, N, S)
    odd = _second_weights(ring, it, values, PARTITION, N, S)
    sums = _done(even, sums, N, S)
    sums = _ask(ring, it, odd, sums, 1, N, S)
    sums = _done(odd, sums, N, S)
    give_back(ring, it, S)
    return sums, it + 1


@gluon.jit
def multiply_int4_tile(ring, it, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """w x^T fp32 of this partition's half of a tile and the first N rows, and the count of steps so far.

    The weights of a block are widened while the matrix unit works on those of the block before, two blocks an
    iteration: see the package's docstring.

    Returns:
        ([part_columns, first], [part_columns, second]) where N is S.bm, else ([part_columns, N],).
    """
    sums = no_sums(N, S)
    if S.halves == 2:
        sums, it = _multiply_double(ring, it, sums, PARTITION, N, S)
    else:
        sums, it = _multiply_single(ring, it, sums, PARTITION, N, S)
    return sums, it
