"""The size of a sort's blocks where the device chooses between two: few rows an expert, or crowds.

Blocks of BM rows suit rows that spread over the experts. Where they crowd on a few, taller blocks read each
expert's weights fewer times. A sort that is given both sizes takes CROWDED_BM where that at least halves how
often weights are read: once for every CROWDED_BM rows of an expert instead of every REACH, which is BM, or
several BM where a program takes blocks together. What follows is launched for both sizes; the one not taken
finds no rows: `num_valid_ids[0]` is 0 where blocks are of CROWDED_BM rows, `crowded_valid_ids[0]` where they
are of BM rows. Entry 1 of both is the live count.

CROWDED_BM 0: one size only, and `crowded` is constantly false.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def crowds(readings, crowded_readings):
    """`moert.steps.sorting.layout.takes_crowded` from how often weights are read either way."""
    return (readings > 0) & (2 * crowded_readings <= readings)


@triton.jit
def whole_blocks(rows, BM: tl.constexpr):
    """Blocks of BM that hold `rows` >= 0."""
    # unsigned: the compiler does not know that rows are never negative
    return ((rows + (BM - 1)).to(tl.uint32) // BM).to(tl.int32)


@triton.jit
def block_size(crowded, BM: tl.constexpr, CROWDED_BM: tl.constexpr):
    size = BM
    if CROWDED_BM:
        size = tl.where(crowded, CROWDED_BM, BM)
    return size


@triton.jit
def blocks_before(row, crowded, BM: tl.constexpr, CROWDED_BM: tl.constexpr):
    """Whole blocks before an output row >= 0; both divisors are constants."""
    blocks = (row.to(tl.uint32) // BM).to(tl.int32)
    if CROWDED_BM:
        blocks = tl.where(crowded, (row.to(tl.uint32) // CROWDED_BM).to(tl.int32), blocks)
    return blocks
