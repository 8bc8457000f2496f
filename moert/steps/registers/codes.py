"""int4 codes on their way in registers: plain loads, some steps ahead of their use.

A lane is given the 16 bytes of a block that it multiplies by (`moert/quantization/int4_layout.py`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _load(codes_ptr, begin, first, tile, live, S: gl.constexpr):
    """Codes of row tiles `tile`.. of a step, [split, row_tiles * blocks, 32, 4].

    Args:
        begin: the block that tile `tile` begins with.
        first: the block of a row that each part begins with, and
        live: whether there is anything for it: [split].
    """
    L: gl.constexpr = S.codes
    b = gl.arange(
        0, S.row_tiles * S.blocks, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L)))
    )
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(3, L))))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L))))
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 0), 3)
    inner = lane * 4 + gl.expand_dims(gl.expand_dims(gl.expand_dims(word, 0), 0), 0)
    row_tile, block = b // S.blocks, b % S.blocks
    start = gl.expand_dims((begin + first) * 128, 1)
    start = start + gl.expand_dims((row_tile * S.row_blocks + block) * 128, 0)
    inside = (gl.expand_dims(first, 1) + gl.expand_dims(block, 0)) < S.row_blocks
    inside = inside & gl.expand_dims(live, 1)
    if S.all_tiles % S.row_tiles != 0:
        inside = inside & gl.expand_dims(tile + row_tile < S.all_tiles, 0)
    pointers = codes_ptr + (gl.expand_dims(gl.expand_dims(start, 2), 3) + inner)
    mask = gl.expand_dims(gl.expand_dims(inside, 2), 3) & (inner >= 0)
    # up to 3% faster so at T=1 on an H200, about 1% at T=4
    return gl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@gluon.jit
def _parts(S: gl.constexpr):
    """0 to split, beside codes."""
    return gl.arange(0, S.split, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, S.codes))))


@gluon.jit
def hold(codes_ptr, step, expert, tile, S: gl.constexpr):
    """Codes of a step of one expert, from row tile `tile` on."""
    part = _parts(S)
    first = (step * S.split + part) * S.blocks
    codes_ptr += (expert.to(gl.int64) * S.all_tiles + tile) * (S.row_blocks * 128)
    return _load(codes_ptr, 0, first, tile, (part >= 0) & (step < S.iterations), S)


@gluon.jit
def hold_by_slot(codes_ptr, step, experts, tile, S: gl.constexpr):
    """Codes of a step through a token's slots.

    Args:
        experts: [asked, split] int32 in shared memory, the expert of each part; -1 asks for nothing.
    """
    part = _parts(S)
    expert = experts.index(step).load(part.type.layout)
    first = (step * S.split + part) % S.steps * S.blocks
    begin = (expert.to(gl.int64) * S.all_tiles + tile) * S.row_blocks
    return _load(codes_ptr, begin, first, tile, expert >= 0, S)
