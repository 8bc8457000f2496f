"""What a streaming kernel is compiled for: one GEMM's weights, its tile, the layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from triton.experimental.gluon import language as gl

from moert.steps.weight_tiles import BLOCK, ROWS, WeightTiles


@dataclass(frozen=True)
class StreamShape(WeightTiles):
    """A compile-time constant of the kernels; its properties are constants there too.

    Args:
        int4, zeros: codes rather than 16-bit weights; with zero points of their own rather than 8.
        group: columns of a group of int4 weights.
        reduction: columns of a weight's row.
        columns: columns of the output, N.
        paired, interleaved: output columns have a gate and an up row; in 16-bit weights the two alternate.
        w_e, w_n: strides of 16-bit weights between experts and rows, in elements.
        bm: rows of inputs, the instruction's columns: a multiple of 8.
        row_tiles: tiles of 16 weight rows a program has at a time.
        row_warps, split: warps over these and over the reduction.
        blocks: blocks of 64 columns that a warp takes at a time.
        stages: of the ring.
        repeats: how many times `row_tiles` a program takes, one after the other.
        slots: K where a program goes through the experts of a token, 0 where it has one expert.
        together: blocks of bm sorted rows of one expert that a program takes at a time, at most.
        wide: how many `bm` counts: 1, but in what `taking` gives.
    """

    int4: bool
    zeros: bool
    group: int
    reduction: int
    columns: int
    paired: bool
    interleaved: bool
    w_e: int
    w_n: int
    bm: int
    row_tiles: int
    row_warps: int
    split: int
    blocks: int
    stages: int
    repeats: int = 1
    slots: int = 0
    together: int = 1
    wide: int = 1

    def taking(self, blocks: int) -> StreamShape:
        """For rows of so many blocks."""
        return replace(self, bm=self.bm * blocks, wide=blocks)

    @property
    def side(self) -> int:
        """Blocks that go through the tiles side by side.

        On an H200, four for one, int4, one block at a time: E=8 K=2 H=4096 I=14336, T=32 255 to 251 us, T=64
        435 to 420, where other tiles are as fast; E=128 K=4 H=I=2880 in groups of 32, T=32: 308 to 325, in
        two runs of which the second read 2% slower.
        """
        return 1 if self.int4 else 4

    @property
    def few_shifts(self) -> bool:
        """Whether codes are widened with a register more and fewer shifts, see `widen.py`."""
        return self.together == 1

    @property
    def warps(self) -> int:
        return self.split * self.row_warps

    @property
    def rows(self) -> int:
        return self.row_tiles * ROWS

    @property
    def width(self) -> int:
        """Columns a warp takes at a time."""
        return self.blocks * BLOCK

    @property
    def parts(self) -> int:
        """Groups of columns within `width` that have scales of their own."""
        return max(1, self.width // self.group) if self.int4 else 1

    @property
    def piecewise(self) -> bool:
        """Whether rows are so many that their columns are multiplied a piece at a time."""
        return self.bm >= 32

    @property
    def piece(self) -> int:
        return min(BLOCK, self.group) if self.int4 else BLOCK

    @property
    def tiles(self) -> int:
        """Programs over the rows of an expert."""
        return -(-self.all_tiles // (self.row_tiles * self.repeats))

    @property
    def steps(self) -> int:
        """Iterations over the reduction; over one slot's, in parts of `width`, where there are slots."""
        return -(-self.row_blocks // (self.blocks * (1 if self.slots else self.split)))

    @property
    def iterations(self) -> int:
        if self.slots:
            return -(-self.slots * self.steps // self.split)
        return self.repeats * self.steps

    @property
    def staged(self) -> int:
        """Iterations whose inputs are staged, as a power of two."""
        return 1 << (self.iterations - 1).bit_length()

    @property
    def asked(self) -> int:
        """Iterations whose weights are asked for, as a power of two: as many again as the ring is ahead."""
        return 1 << (self.iterations + self.stages - 2).bit_length()

    def shared_bytes(self, staged: bool) -> int:
        """Shared memory: the ring, and with `staged` all inputs and what is kept beside them."""
        weights = self.rows * self.width // 2 if self.int4 else self.rows * self.width * 2
        groups = self.parts * self.rows * 2 * (1 + self.zeros) if self.int4 else 0
        rows = self.bm * self.together
        inputs = 0 if staged else rows * self.width * 2
        ring = self.stages * self.split * (weights + groups + inputs)
        # the parts' sums meet in shared memory at the end
        ring += self.split * self.rows * rows * 4
        if not staged:
            return ring
        staged_bytes = self.staged * self.split * (self.width * 2 + 4 * self.parts)
        return ring + staged_bytes + self.asked * self.split * self.parts * 8

    @property
    def mma(self) -> Any:
        """Accumulators [split, rows, bm] of m16n8k16; row tiles go round the warps."""
        return gl.NVMMADistributedLayout([2, 0], [self.split, self.row_warps, 1], [1, 16, 8])

    @property
    def a(self) -> Any:
        return gl.DotOperandLayout(0, self.mma, 2)

    @property
    def b(self) -> Any:
        return gl.DotOperandLayout(1, self.mma, 2)

    @property
    def acc_rows(self) -> Any:
        """[split, rows] beside the accumulators."""
        return gl.SliceLayout(2, self.mma)

    @property
    def acc_parts(self) -> Any:
        """[split] beside the accumulators."""
        return gl.SliceLayout(1, self.acc_rows)

    @property
    def codes(self) -> Any:
        """int4 codes [split, row_tiles * blocks, 32, 4]: a lane has 16 bytes of each of its blocks."""
        return gl.BlockedLayout(
            [1, self.blocks, 1, 4], [1, 1, 32, 1], [self.split, self.row_warps, 1, 1], [3, 2, 1, 0]
        )

    @property
    def matrix(self) -> Any:
        """16-bit rows [split, rows, width], copied 16 bytes a lane."""
        lanes = min(32, self.width // 8)
        return gl.BlockedLayout(
            [1, 1, 8], [1, 32 // lanes, lanes], [self.split, self.row_warps, 1], [2, 1, 0]
        )

    @property
    def values(self) -> Any:
        """Scales or zero points [parts * split, rows], copied 4 bytes a lane."""
        return gl.BlockedLayout([1, 2], [1, 32], [self.split, self.row_warps], [1, 0])

    @property
    def line(self) -> Any:
        """Inputs staged whole [staged, split, width], read 16 bytes a lane."""
        lanes = min(32, self.width // 8)
        return gl.BlockedLayout(
            [1, 1, 8], [32 // lanes, 1, lanes], [self.row_warps, self.split, 1], [2, 1, 0]
        )

    @property
    def table(self) -> Any:
        """A number for each part [asked, parts * split]."""
        return gl.BlockedLayout([1, 1], [32, 1], [self.warps, 1], [1, 0])

    @property
    def flat(self) -> Any:
        """A value for each thread."""
        return gl.BlockedLayout([1], [32], [self.warps], [0])

    def padded(self, slots: int) -> int:
        """A power of two."""
        return 1 << (slots - 1).bit_length()

    def ids(self, slots: int) -> Any:
        """Expert ids [bm, slots], all of them in every warp."""
        lanes = min(32, self.padded(slots))
        held = max(1, self.bm * lanes // 32)
        return gl.BlockedLayout([held, 1], [32 // lanes, lanes], [self.warps, 1], [1, 0])

    @property
    def out(self) -> Any:
        """[rows, bm] to be stored."""
        return gl.BlockedLayout([1, 1], [8, 4], [self.warps, 1], [0, 1])

    def plain(self, rank: int) -> Any:
        """Shared memory in order, as lanes read back what they wrote."""
        return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])

    @property
    def swizzled(self) -> Any:
        """Shared memory of 16-bit rows [split, rows, width], without bank conflicts in `ldmatrix`."""
        return gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
