"""What kernels that make out^T = w x^T share: how many rows a block has, sums, and how results are stored.

A block's rows are columns of the instruction there, and a tile is compiled for a few counts of them: columns
that no row would use are not multiplied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.specialised.pipeline import block_and_tile

# rows of gate weights that lie before as many of up weights: a thread has both of a column
TOGETHER = gl.constexpr(8)


@gluon.jit
def piece(t, blocks, S: gl.constexpr):
    """`block_and_tile`, of the last piece for those behind it, so that what is loaded ahead is there."""
    blocks = gl.maximum(blocks, 1)
    return block_and_tile(gl.minimum(t, blocks * S.tiles - 1), blocks, S)


@gluon.jit
def packed_beyond(
    sorted_token_ids, t, blocks, MANY: gl.constexpr, FEW: gl.constexpr, S: gl.constexpr
):
    """Packed slots of rows MANY and FEW of piece t's block, the first that as many columns have no place for.
    Padding, of slot K, comes last."""
    block, _ = piece(t, blocks, S)
    first = sorted_token_ids + block * S.bm
    return gl.load(first + MANY), gl.load(first + FEW)


@gluon.jit
def output_slots(sorted_token_ids, first, N: gl.constexpr, S: gl.constexpr):
    """Packed slots [N] from one on, as they are needed to store results."""
    return gl.load(sorted_token_ids + first + gl.arange(0, N, gl.SliceLayout(0, S.out)))


@gluon.jit
def no_sums(N: gl.constexpr, S: gl.constexpr):
    """Zeros of the sums of N rows: of both products of a step where N is more than S.first, else of one."""
    if S.first < N:
        A: gl.constexpr = S.accumulators(S.first)
        B: gl.constexpr = S.accumulators(S.second)
        sums = (
            gl.full([S.part_columns, S.first], 0, gl.float32, A),
            gl.full([S.part_columns, S.second], 0, gl.float32, B),
        )
    else:
        L: gl.constexpr = S.accumulators(N)
        sums = (gl.full([S.part_columns, N], 0, gl.float32, L),)  # type: ignore[assignment]
    return sums


@gluon.jit
def gate_and_up(acc, S: gl.constexpr):
    """Sums [rows of weights, N] as gate and up [output columns, N]; the same twice where there is no gate."""
    gate = acc
    up = acc
    if S.paired:
        WIDTH: gl.constexpr = acc.shape[0] // 2
        N: gl.constexpr = acc.shape[1]
        halves = gl.reshape(acc, (WIDTH // TOGETHER, 2, TOGETHER, N))
        gate, up = gl.split(gl.permute(halves, (0, 2, 3, 1)))
        gate = gl.reshape(gate, (WIDTH, N))
        up = gl.reshape(up, (WIDTH, N))
    return gate, up


@gluon.jit
def store_results(results, first, packed, out_ptr, K: gl.constexpr, S: gl.constexpr):
    """Store results [columns, N], output columns from `first` on, to the rows of the packed slots [N]."""
    values = gl.convert_layout(results.to(out_ptr.dtype.element_ty), S.out)
    n = gl.expand_dims(first + gl.arange(0, results.shape[0], gl.SliceLayout(1, S.out)), 1)
    row = ((packed & 0xFFFFFF) * K + (packed >> 24)).to(gl.int64)
    mask = gl.expand_dims((packed >> 24) < K, 0) & (n < S.columns)
    gl.store(gl.expand_dims(out_ptr + row * S.columns, 0) + n, values, mask=mask)


@gluon.jit
def each_tile(
    ONE_TILE: gl.constexpr,
    ring,
    rows,
    args,
    K: gl.constexpr,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    """All tiles of this program by ONE_TILE, each compiled for as many rows as its block has.

    Args:
        ONE_TILE: (ring, steps so far, rows, block, tile, args, K, PARTITION, N, S) -> steps so far; a device
            function.
        rows: sorted_token_ids, sorted_expert_ids and the number of live blocks.
        args: what else it takes. A None in it is one to the compiler as long as the tuple, and what is in it,
            are not given other names.
    """
    sorted_token_ids, _, blocks = rows
    it = 0
    beyond_fewer, beyond_fewest = packed_beyond(
        sorted_token_ids, gl.program_id(0), blocks, S.fewer, S.fewest, S
    )
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        if S.spare:
            # of the next tile, there when this one is done
            next_fewer, next_fewest = packed_beyond(
                sorted_token_ids, t + S.programs, blocks, S.fewer, S.fewest, S
            )
        if (beyond_fewer >> 24) < K:
            it = ONE_TILE(ring, it, rows, block, tile, args, K, PARTITION, S.bm, S)
        elif S.fewest == S.fewer:  # or the same code would be there twice
            it = ONE_TILE(ring, it, rows, block, tile, args, K, PARTITION, S.fewer, S)
        elif (beyond_fewest >> 24) < K:
            it = ONE_TILE(ring, it, rows, block, tile, args, K, PARTITION, S.fewer, S)
        else:
            it = ONE_TILE(ring, it, rows, block, tile, args, K, PARTITION, S.fewest, S)
        if not S.spare:
            next_fewer, next_fewest = packed_beyond(
                sorted_token_ids, t + S.programs, blocks, S.fewer, S.fewest, S
            )
        beyond_fewer, beyond_fewest = next_fewer, next_fewest
