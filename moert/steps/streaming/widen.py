"""int4 codes to 16-bit numbers in the registers of a matrix instruction's first operand.

A nibble ORed into the lowest mantissa bits of 128 (bfloat16, 0x4300) or 1024 (float16, 0x6400) is 128 or
1024 plus its value, exactly; one subtraction for two weights takes away that and the zero point 8, where it
is not taken from the product.

Shifts and logic are done at half the rate of arithmetic, so that nibbles 4 bits higher may be brought there
by a multiply-add of float16. On an H200, streams in microseconds a layer with shifts and with half as many of
their instructions, a process each and twice in turn: E=128 K=8 H=2048 I=768, T=1 11.16 and 10.95, T=2 17.65
and 17.00; E=128 K=4 H=I=2880, T=1 30.2 and 29.3, T=16 199.5 and 197.0; E=256 K=8 H=7168 I=256, T=16 88.5 and
83.7; E=8 K=2 H=4096 I=14336, T=8 171.6 and 173.2. Where blocks are taken together it lost for registers: the
first of these layers, T=64, 87.5 and 89.4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def magic(fp16):
    """What widened codes exceed the codes by."""
    return 1024 if fp16 else 128


@gluon.constexpr_function
def lowest_asm(fp16):
    """magic + code, twice, in t: of the lowest nibbles of both halves of t."""
    word = 0x64006400 if fp16 else 0x43004300
    return f"mov.b32 m, {word:#x}; lop3.b32 t, t, 0x000F000F, m, 0xEA; "


@gluon.constexpr_function
def take_asm(pair, fp16):
    """magic + code, twice, in t: two codes of the word $1, at bits 4 * pair and 16 above."""
    return f"shr.u32 t, $1, {4 * pair}; " + lowest_asm(fp16)


@gluon.constexpr_function
def take_with_fewer_shifts_asm(pair, fp16):
    """The same with one shift for all four pairs of a word, and a register more."""
    shift = "mov.b32 t, $1; " if pair < 2 else "shr.u32 t, $1, 8; "
    if pair % 2 == 0:
        return shift + lowest_asm(fp16)
    if fp16:
        # 1024 + 16 code, of which a sixteenth and 960
        shift += "mov.b32 m, 0x64006400; lop3.b32 t, t, 0x00F000F0, m, 0xEA; "
        return shift + "mov.b32 m, 0x2C002C00; mov.b32 n, 0x63806380; fma.rn.f16x2 t, t, m, n; "
    # as float16 a subnormal, code * 2^-20; it becomes 3.5 + code * 2^-9, whose bits are those of 128 + code
    shift += "and.b32 t, t, 0x00F000F0; "
    return shift + "mov.b32 m, 0x68006800; mov.b32 n, 0x43004300; fma.rn.f16x2 t, t, m, n; "


@gluon.constexpr_function
def widen_asm(pair, fp16):
    """Two codes of a word, at bits 4 * pair and 16 above, less 8, as two 16-bit floats in one register."""
    take = take_asm(pair, fp16)
    if fp16:
        end = "mov.b32 m, 0x64086408; sub.rn.f16x2 $0, t, m;"
    else:
        # t * 1 - 136: the subtraction of bfloat16 pairs is newer than their multiply-add
        end = "mov.b32 m, 0x3F803F80; mov.b32 n, 0xC308C308; fma.rn.bf16x2 $0, t, m, n;"
    return "{ .reg .b32 t, m, n; " + take + end + " }"


@gluon.constexpr_function
def magic_asm(pair, fp16, few_shifts):
    """magic + code of the codes of `widen_asm`."""
    take = take_with_fewer_shifts_asm(pair, fp16) if few_shifts else take_asm(pair, fp16)
    return "{ .reg .b32 t, m, n; " + take + "mov.b32 $0, t; }"


@gluon.jit
def _pair(codes, P: gl.constexpr, FP16: gl.constexpr, S: gl.constexpr):
    asm: gl.constexpr = magic_asm(P, FP16, S.few_shifts)
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
    low = gl.join(_pair(codes, 0, FP16, S), _pair(codes, 1, FP16, S))
    high = gl.join(_pair(codes, 2, FP16, S), _pair(codes, 3, FP16, S))
    w = numbers(low, high, DTYPE)  # SPLIT, tiles, BLOCKS, g, c, word, v1, v2, v0
    split: gl.constexpr = codes.shape[0]
    tiles: gl.constexpr = codes.shape[1]
    w = gl.permute(w, (0, 1, 6, 3, 2, 5, 7, 4, 8))
    return gl.convert_layout(gl.reshape(w, (split, tiles * 16, COLUMNS)), S.a, assert_trivial=True)
