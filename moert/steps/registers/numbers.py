"""Inputs as fixed-point numbers (`moert/steps/fixed_point`), made by each program that needs them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.fixed_point.triton import ROUND, unit


@gluon.jit
def _upper(a, b, c, d):
    """Bytes of four numbers' bits 7 to 14."""
    asm: gl.constexpr = (
        "{ .reg .b32 s, t; prmt.b32 s, $1, $2, 0x5410; prmt.b32 t, $3, $4, 0x5410; shl.b32 s, s, 1; "
        "shl.b32 t, t, 1; prmt.b32 $0, s, t, 0x7531; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,r,r,r,r", [a, b, c, d], gl.int32, True, 1)


@gluon.jit
def _lower(a, b, c, d):
    """Bytes of four numbers' bits 0 to 6."""
    asm: gl.constexpr = (
        "{ .reg .b32 s, t; prmt.b32 s, $1, $2, 0x0040; prmt.b32 t, $3, $4, 0x0040; "
        "prmt.b32 s, s, t, 0x5410; and.b32 $0, s, 0x7F7F7F7F; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,r,r,r,r", [a, b, c, d], gl.int32, True, 1)


@gluon.jit
def stage_numbers(x, S: gl.constexpr):
    """Inputs [staged, split, width] as numbers in shared memory.

    Returns:
        [staged, split, blocks, plane, 4, 4] int32, four bytes of 16 columns for each lane % 4;
        what a unit of a span's numbers is worth, [staged * spans, split] fp32, and what the numbers of each
        of its groups add up to, [staged * spans, sub, split] fp32.
    """
    GROUP: gl.constexpr = S.span // S.sub
    spans = gl.reshape(x.to(gl.float32), (S.staged, S.split, S.spans, S.span))
    worth, inverse = unit(gl.max(gl.abs(spans), 3).to(gl.int32, bitcast=True))
    rounded = spans * gl.expand_dims(inverse, 3) + ROUND
    groups = gl.reshape(rounded - ROUND, (S.staged, S.split, S.spans, S.sub, GROUP))
    totals = gl.sum(groups, 4)
    # the largest of numbers and NaN is a number, their sum is not
    total = gl.convert_layout(gl.sum(totals, 3), worth.type.layout)
    worth = gl.where(total != total, float("nan"), worth)
    number = rounded.to(gl.int32, bitcast=True)
    # of 16 columns, lanes with lane % 4 = c have 2 c, 2 c + 8, 2 c + 1, 2 c + 9, in the bytes of one word
    number = gl.reshape(number, (S.staged, S.split, S.blocks, 4, 2, 4, 2))
    even, odd = gl.split(gl.permute(number, (0, 1, 2, 5, 3, 4, 6)))
    a, b = gl.split(even)
    c, d = gl.split(odd)
    planes = gl.permute(gl.join(_upper(a, b, c, d), _lower(a, b, c, d)), (0, 1, 2, 5, 3, 4))
    numbers = gl.allocate_shared_memory(
        gl.int32, [S.staged, S.split, S.blocks, 2, 4, 4], S.plain(6)
    )
    numbers.store(planes)
    numbers = numbers._reinterpret(gl.int32, [S.staged, S.split, S.blocks, 2, 4, 4], S.plain(5))
    worths = gl.allocate_shared_memory(gl.float32, [S.staged, S.spans, S.split], S.plain(3))
    worths.store(gl.permute(worth, (0, 2, 1)))
    sums = gl.allocate_shared_memory(gl.float32, [S.staged, S.spans, S.sub, S.split], S.plain(4))
    sums.store(gl.permute(totals, (0, 2, 3, 1)))
    worths = worths._reinterpret(gl.float32, [S.staged * S.spans, S.split], S.plain(1))
    sums = sums._reinterpret(gl.float32, [S.staged * S.spans, S.sub, S.split], S.plain(2))
    return numbers, worths, sums
