"""What a stage contributes to the accumulators: products of its weights and the rows beside them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from moert.steps.streaming.copies import copy_inputs
from moert.steps.streaming.stages import ask, group_values, take
from moert.steps.streaming.widen import magic, widen


@gluon.jit
def _columns(value, part: gl.constexpr, PARTS: gl.constexpr):
    """Columns of one of PARTS parts of an operand [split, COLUMNS, bm]."""
    if PARTS > 1:
        split: gl.constexpr = value.shape[0]
        half: gl.constexpr = value.shape[1] // 2
        width: gl.constexpr = value.shape[2]
        halves = gl.permute(gl.reshape(value, (split, 2, half, width)), (0, 2, 3, 1))
        first, second = gl.split(halves)
        upper: gl.constexpr = part >= PARTS // 2
        value = _columns(second if upper else first, part % (PARTS // 2), PARTS // 2)
    return value


@gluon.jit
def codes_of_part(codes, part: gl.constexpr, PARTS: gl.constexpr):
    """Codes of one of PARTS parts of [split, row tiles, BLOCKS, 8, 4, WORDS]: blocks first, then words."""
    if PARTS > 1:
        split: gl.constexpr = codes.shape[0]
        tiles: gl.constexpr = codes.shape[1]
        blocks: gl.constexpr = codes.shape[2]
        words: gl.constexpr = codes.shape[5]
        if blocks > 1:
            halves = gl.reshape(codes, (split, tiles, 2, blocks // 2, 8, 4, words))
            halves = gl.permute(halves, (0, 1, 3, 4, 5, 6, 2))
        else:
            halves = gl.reshape(codes, (split, tiles, 1, 8, 4, 2, words // 2))
            halves = gl.permute(halves, (0, 1, 2, 3, 4, 6, 5))
        first, second = gl.split(halves)
        upper: gl.constexpr = part >= PARTS // 2
        codes = codes_of_part(second if upper else first, part % (PARTS // 2), PARTS // 2)
    return codes


@gluon.jit
def _sum_up(x, total, COLUMNS: gl.constexpr, S: gl.constexpr):
    """total [split, 16, bm] + sums of x over its columns, in every row: the matrix unit adds them up, once
    for all row tiles."""
    return mma_v2(gl.full([S.split, 16, COLUMNS], 1.0, x.dtype, S.a), x, total)


@gluon.jit
def _no_sums(x, S: gl.constexpr):
    return gl.full([S.split, 16, x.shape[2]], 0, gl.float32, S.mma)


@gluon.jit
def _for_all_tiles(total, like, S: gl.constexpr):
    """`total` [split, 16, bm] as `like` [split, rows, bm] wants it."""
    by_tile = gl.reshape(like, (S.split, S.row_tiles, 16, like.shape[2]))
    total = gl.convert_layout(total, gl.SliceLayout(1, by_tile.type.layout), assert_trivial=True)
    total, _ = gl.broadcast(gl.expand_dims(total, 1), by_tile)
    return gl.convert_layout(gl.reshape(total, like.shape), S.mma, assert_trivial=True)


@gluon.jit
def _scaled(product, scale, zero, total):
    """scale * (code - zero point) x, [split, rows, bm] fp32, from the product of codes and x.

    Args:
        zero: what the widened codes exceed the weights by; it is taken from the product, with
        total: the sum of x over the columns.
    """
    return (product - zero * total) * scale


@gluon.jit
def add(acc, taken, x, sums, it, weight, S: gl.constexpr):
    """acc + w x of iteration `it`, in fp32.

    Args:
        taken: what `take` gave.
        x: [split, width, bm], the instruction's second operand.
        sums: [staged * parts, split] fp32 in shared memory, sums of x over each group; None where x has more
            rows than one.
        weight: [split], multiplies what each part contributes; None for 1.
    """
    w, scales, zeros = taken
    if S.int4:
        OFFSET: gl.constexpr = magic(x.dtype == gl.float16)
        PARTS: gl.constexpr = S.parts
        COLUMNS: gl.constexpr = S.width // PARTS
        codes = gl.reshape(w, (S.split, S.row_tiles, S.blocks, 8, 4, 4))
        for part in gl.static_range(PARTS):
            b = gl.convert_layout(_columns(x, part, PARTS), S.b, assert_trivial=True)
            factor = scales[part].to(gl.float32)
            if weight is not None:
                factor = factor * gl.expand_dims(weight, 1)
            total = None
            if sums is not None:
                total = sums.index(it * PARTS + part).load(S.acc_parts)
                total = gl.expand_dims(gl.expand_dims(total, 1), 2)
            if S.zeros:
                zero = gl.expand_dims(zeros[part].to(gl.float32) + OFFSET, 2)
            else:
                zero = 8.0 + OFFSET
            product = gl.full([S.split, S.rows, x.shape[2]], 0, gl.float32, S.mma)
            product = mma_v2(
                widen(codes_of_part(codes, part, PARTS), COLUMNS, x.dtype, S), b, product
            )
            if total is None:
                total = _sum_up(b, _no_sums(b, S), COLUMNS, S)
                total = _for_all_tiles(total, product, S)
            acc += _scaled(product, gl.expand_dims(factor, 2), zero, total)
    elif weight is None:
        acc = mma_v2(w, x, acc)
    else:
        product = mma_v2(w, x, gl.full([S.split, S.rows, x.shape[2]], 0, gl.float32, S.mma))
        acc += product * gl.expand_dims(gl.expand_dims(weight, 1), 2)
    return acc


@gluon.jit
def one_row(stage, S: gl.constexpr):
    """[split, width] of one row in shared memory as the second operand, the same in all its columns."""
    row = stage.load(gl.SliceLayout(2, S.b))
    wide = gl.full([S.split, S.width, S.bm], 0, row.dtype, S.b)
    operand, _ = gl.broadcast(gl.expand_dims(row, 2), wide)
    return operand


@gluon.jit
def advance(acc, ring, inputs, it, tile, w, expert, rows_ptr, live, S: gl.constexpr):
    """acc + w x of iteration `it` where rows are streamed beside one expert's weights; its stage is given
    to what is asked for next.

    Args:
        ring, w: as for `ask`.
        inputs: the ring of rows; rows_ptr, live: as for `copy_inputs`.
    """
    async_copy.wait_group(S.stages - 2)
    nxt = it + S.stages - 1
    if S.piecewise:
        acc = _add_piecewise(acc, ring, inputs, it, S)
        ask(ring, nxt, tile, w, expert, S)
        copy_inputs(inputs, nxt % S.stages, rows_ptr, live, nxt, S)
        async_copy.commit_group()
    else:
        taken = take(ring, it, S)
        rows = inputs.index(it % S.stages).slice(0, S.bm, 1)
        x = rows.permute((0, 2, 1)).load(S.b)
        ask(ring, nxt, tile, w, expert, S)
        copy_inputs(inputs, nxt % S.stages, rows_ptr, live, nxt, S)
        async_copy.commit_group()
        acc = add(acc, taken, x, None, it, None, S)
    return acc


@gluon.jit
def _piece(product, total, codes, rows, PIECE: gl.constexpr, S: gl.constexpr):
    """What a piece of the columns adds to the product of codes and rows [split, bm, width], and to their
    sums."""
    x = rows.slice(PIECE * S.piece, S.piece, 2).permute((0, 2, 1)).load(S.b)
    w = widen(codes_of_part(codes, PIECE, S.width // S.piece), S.piece, x.dtype, S)
    return mma_v2(w, x, product), _sum_up(x, total, S.piece, S)


@gluon.jit
def _add_piecewise(acc, ring, inputs, it, S: gl.constexpr):
    """acc + w x of iteration `it`, a block of columns (or a group, where that is less) at a time: operands of
    many rows in registers at once would leave room for few programs."""
    weights, scales, zeros = ring
    slot = it % S.stages
    rows = inputs.index(slot).slice(0, S.bm, 1)
    PARTS: gl.constexpr = S.parts
    PIECES: gl.constexpr = S.width // S.piece
    if S.int4:
        OFFSET: gl.constexpr = magic(inputs.dtype == gl.float16)
        codes = weights.index(slot).load(S.codes)
        codes = gl.reshape(codes, (S.split, S.row_tiles, S.blocks, 8, 4, 4))
        for part in gl.static_range(PARTS):
            product = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)
            total = gl.full([S.split, 16, S.bm], 0, gl.float32, S.mma)
            for piece in gl.static_range(PIECES // PARTS):
                product, total = _piece(
                    product, total, codes, rows, part * (PIECES // PARTS) + piece, S
                )
            scale = gl.expand_dims(group_values(scales, slot, part, S).to(gl.float32), 2)
            zero = 8.0 + OFFSET
            if S.zeros:
                zero = gl.expand_dims(group_values(zeros, slot, part, S).to(gl.float32) + OFFSET, 2)
            acc += _scaled(product, scale, zero, _for_all_tiles(total, product, S))
    else:
        w_rows = weights.index(slot)
        for piece in gl.static_range(PIECES):
            x = rows.slice(piece * S.piece, S.piece, 2).permute((0, 2, 1)).load(S.b)
            w = w_rows.slice(piece * S.piece, S.piece, 2).load(S.a)
            acc = mma_v2(w, x, acc)
    return acc


@gluon.jit
def group_sums(x, S: gl.constexpr):
    """Sums of staged inputs [staged, split, width] over each group's columns, in shared memory:
    [staged * parts, split].
    """
    sums = gl.allocate_shared_memory(gl.float32, [S.staged, S.parts, S.split], S.plain(3))
    by_part = gl.reshape(x.to(gl.float32), (S.staged, S.split, S.parts, S.width // S.parts))
    total = gl.permute(gl.sum(by_part, 3), (0, 2, 1))
    sums.store(total)
    return sums._reinterpret(gl.float32, [S.staged * S.parts, S.split], S.plain(1))
