"""How a partition multiplies blocks of first + second rows: two products a step, of the same weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from moert.steps.specialised.pipeline import await_copies, give_back
from moert.steps.specialised.transposed import no_sums


@gluon.jit
def _ask(ring, it, sums, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """sums + w x^T of step `it`, this partition's weights, under way when this returns."""
    await_copies(ring, it, S)
    slot = it % S.stages
    w = ring[-3].index(slot).slice(PARTITION * S.part_columns, S.part_columns, 0)
    if S.first < N:
        x, more = ring[0].index(slot), ring[1].index(slot)
        sums = (
            warpgroup_mma(w, x.permute((1, 0)), sums[0], is_async=True),
            warpgroup_mma(w, more.permute((1, 0)), sums[1], is_async=True),
        )
    else:
        x = ring[0].index(slot).slice(0, N, 0)
        sums = (warpgroup_mma(w, x.permute((1, 0)), sums[0], is_async=True),)
    return sums


@gluon.jit
def _done(sums, STEPS: gl.constexpr):
    """The sums once no more than the products of the newest STEPS steps are under way."""
    if len(sums) == 2:
        first, second = warpgroup_mma_wait(2 * STEPS, deps=[sums[0], sums[1]])
        sums = (first, second)
    else:
        sums = (warpgroup_mma_wait(STEPS, deps=[sums[0]]),)
    return sums


@gluon.jit
def multiply_tall_tile(ring, it, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """w x^T fp32 of a partition's weights of one tile and the first N rows, and the count of steps so far.

    Args:
        N: S.bm, or S.first rows or less.

    Returns:
        ([part_columns, first], [part_columns, second]) where N is S.bm, else ([part_columns, N],).
    """
    sums = _done(_ask(ring, it, no_sums(N, S), PARTITION, N, S), 1)
    for _ in range(S.steps - 1):
        sums = _done(_ask(ring, it + 1, sums, PARTITION, N, S), 1)
        # the products of the step before this one are done
        give_back(ring, it, S)
        it += 1
    sums = _done(sums, 0)
    give_back(ring, it, S)
    return sums, it + 1


@gluon.jit
def split_slots(values):
    """[n, N] as two of [n, N / 2], without an exchange between threads."""
    halves = gl.reshape(values, (values.shape[0], 2, values.shape[1] // 2))
    return gl.split(gl.permute(halves, (0, 2, 1)))
