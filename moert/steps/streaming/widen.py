"""int4 codes to 16-bit numbers in the registers of a matrix instruction's first operand.

A nibble ORed into the lowest mantissa bits of 128 (bfloat16, 0x4300) or 1024 (float16, 0x6400) is 128 or
1024 plus its value, exactly; one subtraction for two weights takes away that and the zero point 8, where it
is not taken from the product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def magic(fp16):
    """What widened codes exceed the codes by."""
    return 1024 if fp16 else 128


@gluon.constexpr_function
def take_asm(pair, fp16):
    """magic + code, twice, in t: two codes of the word $1, at bits 4 * pair and 16 above."""
    word = 0x64006400 if fp16 else 0x43004300
    return f"shr.u32 t, $1, {4 * pair}; mov.b32 m, {word:#x}; lop3.b32 t, t, 0x000F000F, m, 0xEA; "


@gluon.constexpr_function
def widen_asm(pair, fp16, subtract):
    """Two codes of a word, at bits 4 * pair and 16 above, as two 16-bit floats in one register."""
    take = take_asm(pair, fp16)
    if not subtract:
        end = "mov.b32 $0, t;"
    elif fp16:
        end = "mov.b32 m, 0x64086408; sub.rn.f16x2 $0, t, m;"
    else:
        # t * 1 - 136: the subtraction of bfloat16 pairs is newer than their multiply-add
        end = "mov.b32 m, 0x3F803F80; mov.b32 n, 0xC308C308; fma.rn.bf16x2 $0, t, m, n;"
    return "{ .reg .b32 t, m, n; " + take + end + " }"


@gluon.jit
def _pair(codes, P: gl.constexpr, FP16: gl.constexpr):
    asm: gl.constexpr = widen_asm(P, FP16, False)
    return gl.inline_asm_elementwise(asm, "=r,r", [codes], gl.int32, True, 1)


@gluon.jit
def numbers(low, high, DTYPE: gl.constexpr):
    """16-bit numbers [..., v1, v2, v0] of registers [..., v1] that have those of v2 = 0 and 1, two each."""
    pairs = gl.join(low, high)
    even = pairs.to(gl.uint16).to(DTYPE, bitcast=True)
    odd = (pairs >> 16).to(gl.uint16).to(DTYPE, bitcast=True)
    return gl.join(even, odd)


@gluon.jit
def widen(
    codes,
    COLUMNS: gl.constexpr,
    DTYPE: gl.constexpr,
    S: gl.constexpr,
):
    """magic + code of codes [SPLIT, row tiles, BLOCKS, 8, 4, words] as [SPLIT, row tiles * 16, COLUMNS].

    Args:
        COLUMNS: BLOCKS * words * 16.
        DTYPE: bfloat16 or float16.
        S: the `StreamShape`. All lanes have the operand's values already: nothing moves.
    """
    FP16: gl.constexpr = gl.float16 == DTYPE
    low = gl.join(_pair(codes, 0, FP16), _pair(codes, 1, FP16))
    high = gl.join(_pair(codes, 2, FP16), _pair(codes, 3, FP16))
    w = numbers(low, high, DTYPE)  # SPLIT, tiles, BLOCKS, g, c, word, v1, v2, v0
    split: gl.constexpr = codes.shape[0]
    tiles: gl.constexpr = codes.shape[1]
    w = gl.permute(w, (0, 1, 6, 3, 2, 5, 7, 4, 8))
    return gl.convert_layout(gl.reshape(w, (split, tiles * 16, COLUMNS)), S.a, assert_trivial=True)
