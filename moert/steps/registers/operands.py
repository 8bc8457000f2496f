"""Codes and numbers as operands of the matrix instruction of bytes, m16n8k32.

A code is an 8-bit number as it is: a word's eight become two words of four bytes by one instruction each,
where 16-bit floats take seven for all. The low nibbles of a word are codes of rows 0 to 7 of a tile, as they
are; the high ones, of rows 8 to 15, are taken as 16 * (code - 8): that sign needs no shift.

The instruction has a column for the upper bits of the inputs and one for the lower ones, and so four pairs of
columns. Where groups have fewer columns than `S.span`, each pair is one group's: the inputs of others are
zero there, and lanes have products of different groups rather than the same ones four times.

Its 32 columns of a row are two words of a lane, 4 columns each, in the order that nibbles have in a word
(`moert/quantization/int4_layout.py`); numbers lie in shared memory as lanes read them, 16 bytes at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.fixed_point.codes import signed_asm


@gluon.jit
def _low_nibbles(codes):
    asm: gl.constexpr = "and.b32 $0, $1, 0x0F0F0F0F;"
    return gl.inline_asm_elementwise(asm, "=r,r", [codes], gl.int32, True, 1)


@gluon.jit
def _high_nibbles(codes):
    """Less 8, times 16."""
    asm: gl.constexpr = signed_asm(1)
    return gl.inline_asm_elementwise(asm, "=r,r", [codes], gl.int32, True, 1)


@gluon.jit
def _bytes(word):
    """[..] int32 -> [.., 2, 2] int8, from the lowest on."""
    first, second = word.to(gl.int8), (word >> 8).to(gl.int8)
    third, fourth = (word >> 16).to(gl.int8), (word >> 24).to(gl.int8)
    return gl.join(gl.join(first, third), gl.join(second, fourth))


@gluon.jit
def weights(codes, S: gl.constexpr):
    """Codes [split, row tiles, blocks, 8, 4, 4] as the first operand [split, rows, span]."""
    a = gl.join(_bytes(_low_nibbles(codes)), _bytes(_high_nibbles(codes)))
    # split, tile, block, g, c, word, byte (2), half -> split, tile, half, g, block, word, c, byte
    a = gl.permute(a, (0, 1, 8, 3, 2, 5, 4, 6, 7))
    return gl.convert_layout(gl.reshape(a, (S.split, S.rows, S.span)), S.a8, assert_trivial=True)


@gluon.jit
def _own_group(like, S: gl.constexpr):
    """Which words [split, span / 64, plane, 4, word, pair] are of the group that the pair is for."""
    BLOCKS: gl.constexpr = S.span // 64
    SIZE: gl.constexpr = S.split * BLOCKS * 128
    flat = gl.reshape(like, (SIZE,))
    place = gl.reshape(gl.arange(0, SIZE, flat.type.layout), like.shape)
    place = gl.convert_layout(place, like.type.layout, assert_trivial=True)
    column = place // 128 % BLOCKS * 64 + place // 4 % 4 * 16
    return column // (S.span // S.sub) == place % 4 * S.sub // 4


@gluon.jit
def inputs(numbers, S: gl.constexpr):
    """Numbers [split, span / 64, plane, 4, 4] int32 in shared memory as the second operand."""
    BLOCKS: gl.constexpr = S.span // 64
    like = gl.full([S.split, S.span, 8], 0, gl.int8, S.b8)
    like = gl.reshape(like, (S.split, BLOCKS, 4, 4, 4, 4, 2))
    # split, block, word, c, byte, pair, plane -> split, block, plane, c, word, pair, byte
    like = gl.permute(like, (0, 1, 6, 3, 2, 5, 4))
    lanes: gl.constexpr = gl.SliceLayout(6, like.type.layout)
    words = gl.expand_dims(numbers.load(gl.SliceLayout(5, lanes)), 5)
    wide = gl.full([S.split, BLOCKS, 2, 4, 4, 4], 0, gl.int32, lanes)
    words, _ = gl.broadcast(words, wide)
    if S.sub > 1:
        words = gl.where(_own_group(wide, S), words, 0)
    b = _bytes(words)
    # split, block, plane, c, word, pair, byte (2) -> split, block, word, c, byte, pair, plane
    b = gl.permute(b, (0, 1, 4, 3, 6, 7, 5, 2))
    return gl.convert_layout(gl.reshape(b, (S.split, S.span, 8)), S.b8, assert_trivial=True)
