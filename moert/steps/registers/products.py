"""What a step contributes to the sums: products of bytes, made floats and scaled."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moert.steps.registers.operands import inputs, weights
from moert.steps.streaming.products import codes_of_part


@gluon.jit
def _halves(value, S: gl.constexpr):
    """[split, rows, 4] -> rows 0 to 7 of each tile and rows 8 to 15, [split, row tiles, 8, 4]."""
    tiles = gl.reshape(value, (S.split, S.row_tiles, 2, 8, 4))
    return gl.split(gl.permute(tiles, (0, 1, 3, 4, 2)))


@gluon.jit
def _by_group(S: gl.constexpr):
    """Accumulators [split, rows, sub, 4 / sub, plane], groups first: their layout is what matters."""
    like = gl.full([S.split, S.rows, 8], 0, gl.float32, S.mma)
    like = gl.reshape(like, (S.split, S.rows, S.sub, 4 // S.sub, 2))
    return gl.permute(like, (2, 0, 1, 3, 4))


@gluon.jit
def _beside(value, S: gl.constexpr):
    """[sub, split, rows or 1] beside products: rows 0 to 7 of each tile and rows 8 to 15, for each pair of
    columns the value of its group, [split, row tiles, 8, 4]."""
    pairs: gl.constexpr = gl.SliceLayout(4, _by_group(S).type.layout)
    like = gl.full([S.sub, S.split, S.rows, 4 // S.sub], 0, value.dtype, pairs)
    value, _ = gl.broadcast(gl.expand_dims(value, 3), like)
    value = gl.permute(value, (1, 2, 0, 3))
    return _halves(gl.reshape(value, (S.split, S.rows, 4)), S)


@gluon.jit
def nothing(S: gl.constexpr):
    """What `add` adds to, to begin with."""
    both = gl.full([S.split, S.rows, 8], 0, gl.float32, S.mma)
    one, _ = gl.split(gl.reshape(both, (S.split, S.rows, 4, 2)))
    return _halves(one, S)


@gluon.jit
def _product(codes, numbers, S: gl.constexpr):
    """Codes of a span times its numbers: rows 0 to 7 of each tile, and 16 times rows 8 to 15."""
    zero = gl.full([S.split, S.rows, 8], 0, gl.int32, S.mma)
    product = mma_v2(weights(codes, S), inputs(numbers, S), zero)
    upper, lower = gl.split(gl.reshape(product, (S.split, S.rows, 4, 2)))
    return _halves((upper * 128 + lower).to(gl.float32), S)


@gluon.jit
def add(sums, codes, values, staged, step, weight, S: gl.constexpr):
    """sums + w x of a step, in fp32.

    Args:
        sums: of `nothing`: rows 0 to 7 of each tile, and 16 times rows 8 to 15, [split, row tiles, 8, 4].
        codes: of the step.
        values: of `stage_values`.
        staged: of `stage_numbers`.
        weight: [split] in the layout `S.acc_parts`, multiplies what each part contributes; None for 1.
    """
    low, high = sums
    numbers, worths, totals = staged
    SPANS: gl.constexpr = S.spans
    BLOCKS: gl.constexpr = S.blocks // SPANS
    VALUES: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, _by_group(S).type.layout))
    TOTALS: gl.constexpr = gl.SliceLayout(2, VALUES)
    codes = gl.reshape(codes, (S.split, S.row_tiles, S.blocks, 8, 4, 4))
    for i in gl.static_range(SPANS):
        span = step * SPANS + i
        group = step * S.scaled + i * S.scaled // SPANS
        its_numbers = numbers.index(step).slice(i * BLOCKS, BLOCKS, 1)
        its_low, its_high = _product(codes_of_part(codes, i, SPANS), its_numbers, S)
        worth = worths.index(span).load(gl.SliceLayout(0, TOTALS))
        if weight is not None:
            worth *= gl.convert_layout(weight, gl.SliceLayout(0, TOTALS), assert_trivial=True)
        factor = gl.expand_dims(gl.expand_dims(worth, 0), 2)
        factor = factor * values[0].index(group).load(VALUES).to(gl.float32)
        factor_low, factor_high = _beside(factor, S)
        total_low, total_high = _beside(gl.expand_dims(totals.index(span).load(TOTALS), 2), S)
        if S.zeros:
            zero = values[1].index(group).load(VALUES).to(gl.float32)
            zero_low, zero_high = _beside(zero, S)
            its_low -= zero_low * total_low
            its_high -= (zero_high - 8.0) * 16.0 * total_high
        else:
            its_low -= 8.0 * total_low
        low += its_low * factor_low
        high += its_high * factor_high
    return low, high


@gluon.jit
def total(sums, S: gl.constexpr):
    """What has been added up: rows 0 to 7 of each tile and rows 8 to 15, [row tiles, 8] fp32."""
    # pairs of columns of one group have the same
    low, high = gl.sum(sums[0], 3) * (S.sub / 4), gl.sum(sums[1], 3) * (S.sub / 64)
    return gl.sum(low, 0), gl.sum(high, 0)


@gluon.jit
def in_rows(low, high, S: gl.constexpr):
    """[row tiles, 8] twice, of `total`, as [rows]."""
    both = gl.full([S.row_tiles, 2, 8], 0, gl.float32, S.halves)
    low, _ = gl.broadcast(
        gl.expand_dims(gl.convert_layout(low, gl.SliceLayout(1, S.halves)), 1), both
    )
    high, _ = gl.broadcast(
        gl.expand_dims(gl.convert_layout(high, gl.SliceLayout(1, S.halves)), 1), both
    )
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, S.halves)))
    half = gl.expand_dims(gl.expand_dims(half, 0), 2)
    return gl.reshape(gl.where(half == 0, low, high), (S.rows,))
