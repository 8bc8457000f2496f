"""Which rows of inputs a program of a grouped stream takes beside its expert's weights.

A row is written as a sort writes it, slot << 24 | token; slot K stands for none.

After a sort a program begins with one block of BM rows. Where an expert has several, one program takes up
to S.together of them, so that weights are read, and widened, once for all of their rows; the instructions it
runs through are those for as many rows as there are.

Without a sort, where there are no more tokens than BM, column c of the instruction is token c: the first
routed row of an expert stands for all of its rows, and no weight is read twice.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.call_args import load_expert_id

# blocks before its own that a program looks at to tell how many its expert has there: behind as many, every
# block is taken by itself
BEFORE = gl.constexpr(128)


@gluon.jit
def block_and_tile(S: gl.constexpr):
    """Block of sorted rows and first row tile of this program.

    S.side blocks go through the tiles side by side. Blocks of one expert read the same weights: where these
    are more than a cache holds, one block after the other would read them from memory each time.
    """
    SIDE: gl.constexpr = S.side
    GROUP: gl.constexpr = SIDE * S.tiles
    program = gl.program_id(0)
    inside = program % GROUP
    whole = program < gl.num_programs(0) // GROUP * GROUP
    block = gl.where(whole, program // GROUP * SIDE + inside % SIDE, program // S.tiles)
    tile = gl.where(whole, inside // SIDE, program % S.tiles)
    return block, tile * (S.row_tiles * S.repeats)


@gluon.jit
def taken_blocks(sorted_expert_ids, block, blocks, expert, S: gl.constexpr):
    """How many blocks, from `block` on, a program takes; 0 where the program of an earlier block has it.

    Args:
        blocks: how many the sort has made.
        expert: of this one, which is one of them.
    """
    at = block - BEFORE + gl.arange(0, 2 * BEFORE, S.flat)
    experts = gl.load(sorted_expert_ids + at, mask=(at >= 0) & (at < blocks), other=-1)
    same = experts == expert
    before = gl.sum((same & (at < block)).to(gl.int32), 0)
    after = gl.sum((same & (at >= block)).to(gl.int32), 0)
    taken = gl.where(before % S.together == 0, gl.minimum(after, S.together), 0)
    return gl.where(before == BEFORE, 1, taken)


@gluon.jit
def gathered_rows(
    ids_ptr, ids_stride, ids_words, live, row, E: gl.constexpr, K: gl.constexpr, S: gl.constexpr
):
    """The rows [bm] of the expert of a routed row, at the places of their tokens; and the expert, -1 where
    the program has nothing to do: no expert, or one that an earlier row stands for.

    A token that names an expert again has another row of it, which is gathered by itself.

    Args:
        live: T, no more than bm.
        row: token * K + slot.
    """
    L: gl.constexpr = S.ids(K)
    SLOTS: gl.constexpr = S.padded(K)
    tokens = gl.arange(0, S.bm, gl.SliceLayout(1, L))
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, L))
    token = gl.expand_dims(tokens, 1)
    slot = gl.expand_dims(slots, 0)
    mask = (token < live) & (slot < K)
    ids = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, mask, E)
    mine = row // K
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, mine, row % K, mine < live, E)
    first = gl.min(gl.where(ids == expert, slot, SLOTS), 1)
    repeated = gl.sum(gl.where(tokens == mine, first, 0), 0) != row % K
    earlier = gl.sum(((tokens < mine) & (first < SLOTS)).to(gl.int32), 0)
    expert = gl.where(repeated | (earlier == 0), expert, -1)
    alone = gl.where(tokens == mine, row % K, SLOTS)
    first = gl.where(repeated, alone, first)
    return gl.where(first < SLOTS, (first << 24) | tokens, K << 24), expert


@gluon.jit
def input_layout(rows, S: gl.constexpr):
    """Rows [bm] as those that are copied, [split, bm, width]."""
    return gl.convert_layout(rows, gl.SliceLayout(0, gl.SliceLayout(2, S.matrix)))


@gluon.jit
def output_layout(rows, S: gl.constexpr):
    """Rows [bm] as the columns of what is stored, [rows, bm]."""
    return gl.convert_layout(rows, gl.SliceLayout(0, S.out))


@gluon.jit
def load_rows(sorted_token_ids, block, taken, L: gl.constexpr, K: gl.constexpr, S: gl.constexpr):
    """The rows [bm] of S, `taken` blocks of them, from `block` on."""
    at = gl.arange(0, S.bm, L)
    first = block * (S.bm // S.wide)
    return gl.load(sorted_token_ids + first + at, mask=at < taken * (S.bm // S.wide), other=K << 24)
