"""Asynchronous copies of one stage: weights, group values, rows of inputs. Masked-off bytes become zero.

`expert` is a number, or a tensor with one for each part of the reduction; `first` the first block of 64
columns that a part copies, `live` whether it copies: [SPLIT] of the slice layout named in each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def code_pointers(codes_ptr, expert, tile, first, live, S: gl.constexpr):
    """Where the codes of row tiles `tile`.. are, [split, row_tiles * blocks, 32, 4], and a mask; parts:
    dimension 0 of S.codes."""
    L: gl.constexpr = S.codes
    b = gl.arange(
        0, S.row_tiles * S.blocks, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L)))
    )
    row_tile, block = tile + b // S.blocks, b % S.blocks
    start = gl.expand_dims(expert * (S.all_tiles * S.row_blocks * 128) + first * 128, 1)
    start = start + gl.expand_dims((row_tile * S.row_blocks + block) * 128, 0)
    inside = (gl.expand_dims(first, 1) + gl.expand_dims(block, 0)) < S.row_blocks
    inside = inside & gl.expand_dims(live, 1) & gl.expand_dims(row_tile < S.all_tiles, 0)
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(3, L))))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L))))
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 0), 3)
    word = gl.expand_dims(gl.expand_dims(gl.expand_dims(word, 0), 0), 0)
    inner = lane * 4 + word
    pointers = codes_ptr + (gl.expand_dims(gl.expand_dims(start, 2), 3) + inner)
    return pointers, gl.expand_dims(gl.expand_dims(inside, 2), 3) & (inner >= 0)


@gluon.jit
def copy_codes(stage, codes_ptr, expert, tile, first, live, S: gl.constexpr):
    """Codes of row tiles `tile`.. into [split, row_tiles * blocks, 32, 4]."""
    pointers, mask = code_pointers(codes_ptr, expert, tile, first, live, S)
    async_copy.async_copy_global_to_shared(stage, pointers, mask)


@gluon.jit
def copy_matrix(stage, w_ptr, expert, tile, first, live, S: gl.constexpr):
    """16-bit weights of row tiles `tile`.. into [split, rows, width]; parts: dimension 0 of S.matrix.

    Tile t holds rows 16 t ..; paired: gate rows 8 t .. and then the up rows of the same output columns.
    """
    L: gl.constexpr = S.matrix
    r = gl.arange(0, S.rows, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    if S.paired:
        column = (tile + r // 16) * 8 + r % 8
        half = (r % 16) // 8
        row = column * 2 + half if S.interleaved else column + half * S.columns
    else:
        column = tile * 16 + r
        row = column
    k = gl.arange(0, S.width, gl.SliceLayout(0, gl.SliceLayout(0, L)))
    k = gl.expand_dims(gl.expand_dims(k, 0), 0)
    start = gl.expand_dims(gl.expand_dims(first * 64, 1), 2)
    offset = gl.expand_dims(gl.expand_dims(expert * S.w_e + first * 64, 1), 2)
    offset = offset + gl.expand_dims(gl.expand_dims(row.to(gl.int64) * S.w_n, 0), 2) + k
    mask = (start + k < S.reduction) & gl.expand_dims(gl.expand_dims(column < S.columns, 0), 2)
    mask = mask & gl.expand_dims(gl.expand_dims(live, 1), 2)
    async_copy.async_copy_global_to_shared(stage, w_ptr + offset, mask)


@gluon.jit
def copy_values(stage, values_ptr, expert, tile, first, live, S: gl.constexpr):
    """Scales or zero points into [parts * split, rows]; `first` and `live` of as many (S.values).

    Entry q gets those of the group `q // split` of its blocks.
    """
    L: gl.constexpr = S.values
    q = gl.arange(0, S.parts * S.split, gl.SliceLayout(1, L))
    group = (first * 64) // S.group + q // S.split
    r = gl.arange(0, S.rows, gl.SliceLayout(0, L))
    row_tile = tile + r // 16
    offset = gl.expand_dims(expert * (S.all_tiles * S.groups * 16) + group * 16, 1)
    offset = offset + gl.expand_dims(row_tile * (S.groups * 16) + r % 16, 0)
    mask = gl.expand_dims((group < S.groups) & live, 1) & gl.expand_dims(row_tile < S.all_tiles, 0)
    async_copy.async_copy_global_to_shared(stage, values_ptr + offset, mask)


@gluon.jit
def copy_inputs(ring, slot, rows_ptr, live, it, S: gl.constexpr):
    """The columns of iteration `it` of rows [bm], which begin at `rows_ptr`, into [split, bm, width]: the
    first rows of a place of the ring."""
    stage = ring.index(slot).slice(0, S.bm, 1)
    L: gl.constexpr = S.matrix
    part = gl.arange(0, S.split, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    start = ((it % S.steps) * S.split + part) * S.width
    k = gl.arange(0, S.width, gl.SliceLayout(0, gl.SliceLayout(0, L)))
    k = gl.expand_dims(gl.expand_dims(start, 1), 2) + gl.expand_dims(gl.expand_dims(k, 0), 0)
    pointers = gl.expand_dims(gl.expand_dims(rows_ptr, 0), 2) + k
    live = live & (it < S.iterations)
    mask = gl.expand_dims(gl.expand_dims(live, 0), 2) & (k < S.reduction)
    async_copy.async_copy_global_to_shared(stage, pointers, mask)
