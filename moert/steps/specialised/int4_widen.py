"""int4 codes to scaled 16-bit weights in the registers of `wgmma`'s first operand."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.streaming.widen import numbers, take_asm


@gluon.constexpr_function
def scaled_asm(pair, fp16):
    """Two codes of a word, at bits 4 * pair and 16 above, as (code + magic + offset) * scale.

    The magic number is 128 (bfloat16) or 1024 (float16) with the code in its lowest bits, exactly; so is
    the difference to the offset. The product is rounded once.
    """
    if fp16:
        end = "add.rn.f16x2 t, t, $2; mul.rn.f16x2 $0, t, $3;"
    else:
        end = "mov.b32 m, 0x3F803F80; fma.rn.bf16x2 t, t, m, $2; mul.rn.bf16x2 $0, t, $3;"
    return "{ .reg .b32 t, m; " + take_asm(pair, fp16) + end + " }"


@gluon.jit
def _pair(codes, offset, scale, P: gl.constexpr, FP16: gl.constexpr):
    asm: gl.constexpr = scaled_asm(P, FP16)
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [codes, offset, scale], gl.int32, True, 1)


@gluon.jit
def _of_words(ring, at, v1: gl.constexpr, like, S: gl.constexpr):
    """Values of rows 8 * v1 + g, each of its word's group, to go with words [row_tiles, 8, 4, 4].

    Args:
        ring: [n, row_tiles, 16] in shared memory, those of both warpgroups in turn; at: the first part.
    """
    L: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, like.type.layout))
    value = ring.index(at).slice(8 * v1, 8, 1).load(L)
    value, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(value, 2), 3), like)
    if S.parts == 2:
        other = ring.index(at + 2).slice(8 * v1, 8, 1).load(L)
        W: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, like.type.layout)))
        word = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 4, W), 0), 0), 0)
        other, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(other, 2), 3), like)
        value = gl.where(word < 2, value, other)
    return value


@gluon.jit
def _twice(value):
    """16 bits in both halves of 32."""
    word = value.to(gl.uint16, bitcast=True).to(gl.int32)
    return word | (word << 16)


@gluon.jit
def _offsets(zeros, at, v1: gl.constexpr, words, FP16: gl.constexpr, S: gl.constexpr):
    """-(magic + zero point) in both halves of a word: the zero point is in the lowest bits there too."""
    if S.zeros:
        zero = _of_words(zeros, at, v1, words, S).to(gl.int32)
    else:
        zero = gl.full_like(words, 8)
    return zero * 0x00010001 + (-0x1BFF1C00 if FP16 else -0x3CFF3D00)


@gluon.jit
def step_values(scales, zeros, at, words, DTYPE: gl.constexpr, S: gl.constexpr):
    """What the words of a block are widened with: scales of rows g and 8 + g, offsets of both, each twice.

    Args:
        scales, zeros, at: as for `_of_words`.
        words: [row_tiles, 8, 4, 4], of `block_words`.
    """
    FP16: gl.constexpr = gl.float16 == DTYPE
    s0 = _twice(_of_words(scales, at, 0, words, S))
    s1 = _twice(_of_words(scales, at, 1, words, S))
    z0 = _offsets(zeros, at, 0, words, FP16, S)
    z1 = _offsets(zeros, at, 1, words, FP16, S)
    return s0, s1, z0, z1


@gluon.jit
def block_words(codes, S: gl.constexpr):
    """Codes [row_tiles, 32, 4] int32 of the layout S.codes as [row_tiles, 8, 4, 4]."""
    return gl.reshape(codes, (S.row_tiles, 8, 4, 4))


@gluon.jit
def scaled_weights(words, values, DTYPE: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """(code - zero point) * scale of one block, [row_tiles * 16, 64] of DTYPE, as the first operand.

    Args:
        words: of `block_words`; values: of `step_values`.
        N: columns of the instruction.
    """
    FP16: gl.constexpr = gl.float16 == DTYPE
    s0, s1, z0, z1 = values
    low = gl.join(_pair(words, z0, s0, 0, FP16), _pair(words, z1, s1, 1, FP16))
    high = gl.join(_pair(words, z0, s0, 2, FP16), _pair(words, z1, s1, 3, FP16))
    w = numbers(low, high, DTYPE)  # tiles, g, c, word, v1, v2, v0
    w = gl.permute(w, (0, 4, 1, 3, 5, 2, 6))
    w = gl.reshape(w, (S.row_tiles * 16, 64))
    return gl.convert_layout(w, S.a(N), assert_trivial=True)
