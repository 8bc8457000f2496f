"""Packed int4 codes inside portable Triton kernels (layout: `moert/quantization/int4_layout.py`).

Three ways to make numbers of codes. "asm": NVIDIA's instructions, see `moert/steps/streaming/widen.py`.
"magic": the same in plain operations, which AMD's compiler turns into `v_and_or_b32`; integer to float
conversion runs at a fraction of the rate of arithmetic on both makers' chips. "integer": conversion, exact
in any dtype, for float32 activations and for Triton's interpreter, whose bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.streaming.widen import widen_asm


@triton.jit
def nibble(codes, v2: tl.constexpr, v1: tl.constexpr, v0: tl.constexpr):
    """Code minus 8 of value (v2, v1, v0) of each word, int32."""
    return ((codes >> (4 * (2 * v2 + v1) + 16 * v0)) & 15) - 8


@triton.jit
def _asm_pair(codes, P: tl.constexpr, FP16: tl.constexpr):
    asm: tl.constexpr = widen_asm(P, FP16)
    return tl.inline_asm_elementwise(asm, "=r,r", [codes], tl.int32, True, 1)


@triton.jit
def _magic_pair(codes, P: tl.constexpr, FP16: tl.constexpr):
    word: tl.constexpr = 0x64006400 if FP16 else 0x43004300
    return ((codes >> (4 * P)) & 0x000F000F) | word


@triton.jit
def _columns_last(w, BLOCKS: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr):
    """[BLOCKS, TILES, 32, WORDS, v1, v2, v0] as the matrix [TILES * 16, BLOCKS * WORDS * 16]."""
    w = tl.reshape(w, (BLOCKS, TILES, 8, 4, WORDS, 2, 2, 2))
    w = tl.permute(w, (1, 5, 2, 0, 4, 6, 3, 7))
    return tl.reshape(w, (TILES * 16, BLOCKS * WORDS * 16))


@triton.jit
def widen(
    codes,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
    WAY: tl.constexpr,
):
    """code - 8 of words [BLOCKS, TILES, 32, WORDS] as a matrix [TILES * 16, BLOCKS * WORDS * 16] of DTYPE.

    Args:
        WAY: "asm", "magic" or "integer"; the first two for bfloat16 and float16.
    """
    if WAY == "integer":
        low = tl.join(
            tl.join(nibble(codes, 0, 0, 0), nibble(codes, 0, 1, 0)),
            tl.join(nibble(codes, 1, 0, 0), nibble(codes, 1, 1, 0)),
        )
        high = tl.join(
            tl.join(nibble(codes, 0, 0, 1), nibble(codes, 0, 1, 1)),
            tl.join(nibble(codes, 1, 0, 1), nibble(codes, 1, 1, 1)),
        )
        w = tl.join(low, high).to(tl.float32).to(DTYPE)
    else:
        FP16: tl.constexpr = tl.float16 == DTYPE
        if WAY == "asm":
            first = tl.join(_asm_pair(codes, 0, FP16), _asm_pair(codes, 1, FP16))
            pairs = tl.join(first, tl.join(_asm_pair(codes, 2, FP16), _asm_pair(codes, 3, FP16)))
        else:
            first = tl.join(_magic_pair(codes, 0, FP16), _magic_pair(codes, 1, FP16))
            pairs = tl.join(
                first, tl.join(_magic_pair(codes, 2, FP16), _magic_pair(codes, 3, FP16))
            )
        even = pairs.to(tl.uint16).to(DTYPE, bitcast=True)
        odd = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        w = tl.join(even, odd)
        if WAY == "magic":
            # exact: both are whole numbers that DTYPE holds
            w = w - (1032.0 if FP16 else 136.0)
    return _columns_last(w, BLOCKS, TILES, WORDS)


@triton.jit
def word_offsets(
    tile,
    NT: tl.constexpr,
    KT: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Offsets [BLOCKS, TILES, 32, WORDS] of the words of row tiles from `tile` on; one past the last is the
    last one again. Offsets are within an expert, whose codes fit 32 bits by far."""
    tiles = tl.minimum(tile + tl.arange(0, TILES), NT - 1)
    block = tl.arange(0, BLOCKS)[:, None] + tiles[None, :] * KT
    lane = tl.arange(0, 32)[:, None] * 4 + tl.arange(0, WORDS)[None, :]
    return block[:, :, None, None] * 128 + lane[None, None, :, :]


@triton.jit
def row_offsets(tile, NT: tl.constexpr, GN: tl.constexpr, TILES: tl.constexpr):
    """Offsets [TILES * 16] of the first group's values of the rows of these tiles."""
    tiles = tl.minimum(tile + tl.arange(0, TILES), NT - 1)
    return tl.reshape(tiles[:, None] * (GN * 16) + tl.arange(0, 16)[None, :], (TILES * 16,))


@triton.jit
def lane_offsets(tile, NT: tl.constexpr, GN: tl.constexpr, TILES: tl.constexpr):
    """The same [1, TILES, 32, 1] for row g of each lane; row g + 8 is 8 further."""
    tiles = tl.minimum(tile + tl.arange(0, TILES), NT - 1)
    return (tiles[:, None] * (GN * 16) + (tl.arange(0, 32) // 4)[None, :])[None, :, :, None]


@triton.jit
def lane_columns(BLOCKS: tl.constexpr, WORDS: tl.constexpr, v2: tl.constexpr, v0: tl.constexpr):
    """Columns [BLOCKS, 1, 32, WORDS] that values (v2, *, v0) of the words stand in."""
    block = tl.arange(0, BLOCKS)[:, None, None, None] * 64
    lane = (tl.arange(0, 32) % 4)[None, None, :, None] * 2
    return block + lane + tl.arange(0, WORDS)[None, None, None, :] * 16 + (8 * v2 + v0)


@triton.jit
def rows_of_lanes(first, second, BLOCKS: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr):
    """Sums over columns of what the lanes have of rows g and g + 8: two [TILES * 8]."""
    first = tl.reshape(first, (BLOCKS, TILES, 8, 4, WORDS))
    second = tl.reshape(second, (BLOCKS, TILES, 8, 4, WORDS))
    first = tl.sum(tl.sum(tl.sum(first, 4), 3), 0)
    second = tl.sum(tl.sum(tl.sum(second, 4), 3), 0)
    return tl.reshape(first, (TILES * 8,)), tl.reshape(second, (TILES * 8,))


@triton.jit
def interleave_halves(first, second, TILES: tl.constexpr):
    """Rows g and g + 8 of each tile, two [TILES * 8], in order: [TILES * 16]."""
    both = tl.join(tl.reshape(first, (TILES, 8)), tl.reshape(second, (TILES, 8)))
    return tl.reshape(tl.permute(both, (0, 2, 1)), (TILES * 16,))


@triton.jit
def step_offset(k0, WORDS: tl.constexpr):
    """Words between the start of a row tile and a step that begins with column `k0`."""
    offset = (k0 // 64) * 128
    if WORDS < 4:
        # written so that the compiler sees what it is a multiple of: loads are as wide as that allows
        offset += ((k0 // (WORDS * 16)) % (4 // WORDS)) * WORDS
    return offset
