"""How a partition multiplies int4 codes by fixed-point rows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from moert.steps.fixed_point.codes import signed_asm
from moert.steps.specialised.fixed_shape import PIECE as _PIECE
from moert.steps.specialised.fixed_shape import PIECES as _PIECES
from moert.steps.specialised.pipeline import await_copies, give_back

PIECE = gl.constexpr(_PIECE)
PIECES = gl.constexpr(_PIECES)
TILES = gl.constexpr(_PIECE // 16)
# what a unit of a signed byte of codes is worth: it has them in its upper half
_CODE = gl.constexpr(0.0625)


@gluon.jit
def _signed(words, V1: gl.constexpr):
    """[.., 4] int8 of the rows 8 * V1 + g of words."""
    asm: gl.constexpr = signed_asm(V1)
    # the instruction takes the word of its first entry, and gives four
    return gl.inline_asm_elementwise(asm, "=r,r,r,r,r", [words], gl.int8, True, 4)


@gluon.jit
def _ask(ring, slot, AT: gl.constexpr, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """The product of one of a partition's pieces and a step's rows, under way when this returns."""
    FIRST: gl.constexpr = (PARTITION * PIECES + AT) * TILES
    codes = ring[3]
    low = codes.index(slot * 2).slice(FIRST, TILES, 0).load(S.codes)
    high = codes.index(slot * 2 + 1).slice(FIRST, TILES, 0).load(S.codes)
    words = gl.join(gl.reshape(low, (TILES, 8, 4, 4)), gl.reshape(high, (TILES, 8, 4, 4)))
    words = gl.reshape(gl.permute(words, (0, 1, 2, 4, 3)), (TILES, 8, 4, 8))
    twice = gl.join(words, words)
    words = gl.reshape(gl.join(twice, twice), (TILES, 8, 4, 8, 4))
    # in this order of registers, or four neighbours were no word
    words = gl.convert_layout(words, S.bytes)
    w = gl.join(_signed(words, 0), _signed(words, 1))  # tiles, g, c, word, i, v1
    w = gl.reshape(gl.permute(w, (0, 5, 1, 3, 2, 4)), (PIECE, 128))
    w = gl.convert_layout(w, S.operand(N), assert_trivial=True)
    x = ring[0].index(slot).slice(0, 2 * N, 0)
    none = gl.full([PIECE, 2 * N], 0, gl.int32, S.products(N))
    return warpgroup_mma(w, x.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _add(ring, slot, both, acc, AT: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr):
    """acc and what the product of a piece is worth."""
    _, worths, totals, _, scales, zeros, _, _ = ring
    N: gl.constexpr = acc.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    FIRST: gl.constexpr = (PARTITION * PIECES + AT) * PIECE
    high, low = gl.split(gl.reshape(both, (PIECE, N, 2)))
    product = (high * 128 + low).to(gl.float32)
    worth = worths.index(slot).slice(0, N, 0).load(COLUMNS)
    product *= gl.expand_dims(worth, 0)
    if S.zeros:
        total = totals.index(slot).slice(0, N, 0).load(COLUMNS)
        zero = zeros.index(slot).slice(FIRST, PIECE, 0).load(ROWS).to(gl.float32)
        product += gl.expand_dims((8.0 - zero) / _CODE, 1) * gl.expand_dims(total, 0)
    scale = scales.index(slot).slice(FIRST, PIECE, 0).load(ROWS).to(gl.float32) * _CODE
    return acc + product * gl.expand_dims(scale, 1)


@gluon.jit
def _one_step(ring, it, first, second, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """Sums of both pieces and their products of step `it`: one is under way while the other is scaled."""
    slot = it % S.stages
    await_copies(ring, it, S)
    one = _ask(ring, slot, 0, PARTITION, N, S)
    two = _ask(ring, slot, 1, PARTITION, N, S)
    first = _add(ring, slot, warpgroup_mma_wait(1, deps=[one]), first, 0, PARTITION, S)
    second = _add(ring, slot, warpgroup_mma_wait(0, deps=[two]), second, 1, PARTITION, S)
    give_back(ring, it, S)
    return first, second


@gluon.jit
def _two_steps(ring, it, first, second, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """`_one_step` of `it` and `it` + 1, with a product under way between them.

    None is when this returns: the compiler waits for each product of a loop that leaves one under way.
    """
    slot = it % S.stages
    after = (it + 1) % S.stages
    await_copies(ring, it, S)
    one = _ask(ring, slot, 0, PARTITION, N, S)
    two = _ask(ring, slot, 1, PARTITION, N, S)
    first = _add(ring, slot, warpgroup_mma_wait(1, deps=[one]), first, 0, PARTITION, S)
    await_copies(ring, it + 1, S)
    three = _ask(ring, after, 0, PARTITION, N, S)
    second = _add(ring, slot, warpgroup_mma_wait(1, deps=[two]), second, 1, PARTITION, S)
    give_back(ring, it, S)
    four = _ask(ring, after, 1, PARTITION, N, S)
    first = _add(ring, after, warpgroup_mma_wait(1, deps=[three]), first, 0, PARTITION, S)
    second = _add(ring, after, warpgroup_mma_wait(0, deps=[four]), second, 1, PARTITION, S)
    give_back(ring, it + 1, S)
    return first, second


@gluon.jit
def multiply_fixed_tile(ring, it, PARTITION: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """w x^T fp32 of this partition's part of a tile and the first N rows, and the count of steps so far.

    Returns:
        [PIECE, N] for each piece of the partition, held where both bytes of a row add up in one thread.
    """
    both = gl.full([PIECE, 2 * N], 0, gl.int32, S.products(N))
    none, _ = gl.split(gl.reshape(both, (PIECE, N, 2)))
    first = none.to(gl.float32)
    second = first
    LEFT: gl.constexpr = S.steps % 2 if S.in_twos(N) else S.steps
    if S.in_twos(N):
        for _ in range(S.steps // 2):
            first, second = _two_steps(ring, it, first, second, PARTITION, N, S)
            it += 2
    for _ in range(LEFT):
        first, second = _one_step(ring, it, first, second, PARTITION, N, S)
        it += 1
    return (first, second), it
