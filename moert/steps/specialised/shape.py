"""What a warp-specialised kernel is compiled for: one GEMM's sizes, its tile, the layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

MULTIPLY_WARPS = 4  # of each of two partitions
COPY_WARPS = 4
REGISTERS = (184, 136)  # of a thread of the second multiplying partition, and of one that copies
STEP = 64  # columns of the reduction a stage holds: 128 bytes, a row of the swizzled shared memory


@dataclass(frozen=True)
class SpecialisedShape:
    """A compile-time constant of the kernels; its properties are constants there too.

    Args:
        reduction: columns of a weight's row.
        columns: columns of the output, N.
        paired, interleaved: output columns have a gate and an up row of the weights; the two alternate.
        w_e, w_n: strides of the weights between experts and rows, in elements.
        bm: BM, 64 or 128 rows of inputs.
        bn: rows of weights a program takes; half as many output columns where paired.
        stages: of the ring.
        side: blocks that go through the tiles side by side.
        programs: workgroups that share all tiles.
    """

    reduction: int
    columns: int
    paired: bool
    interleaved: bool
    w_e: int
    w_n: int
    bm: int
    bn: int
    stages: int
    side: int
    programs: int

    @property
    def width(self) -> int:
        """Output columns of a tile."""
        return self.bn // 2 if self.paired else self.bn

    @property
    def tiles(self) -> int:
        return -(-self.columns // self.width)

    @property
    def steps(self) -> int:
        return -(-self.reduction // STEP)

    @property
    def shared_bytes(self) -> int:
        """Shared memory: the ring, its barriers, and what results pass through on their way out."""
        out = 2 * self.part_rows * self.stored * 2
        return self.stages * ((self.bm + self.bn) * STEP * 2 + 16) + out + 1024

    @property
    def workers(self) -> list[int]:
        return [MULTIPLY_WARPS, COPY_WARPS]

    @property
    def registers(self) -> list[int]:
        return list(REGISTERS)

    @property
    def by_rows(self) -> bool:
        """Whether the multiplying partitions share a tile's rows, where there are enough, or its columns."""
        return self.bm == 128

    @property
    def abreast(self) -> int:
        """Steps that are copied together: of a row, twice as many bytes at a time are read from memory, but
        the places for both have to be empty, of which a short ring has too few. A last one by itself would
        take registers of its own."""
        return 2 if self.stages >= 5 and self.steps % 2 == 0 else 1

    @property
    def first(self) -> int:
        """Rows of a block that lie in the ring's first places for rows: here all."""
        return self.bm

    @property
    def second(self) -> int:
        """Rows that lie in the second ones."""
        return self.bm - self.first

    @property
    def group(self) -> int:
        """Where paired, gate rows that lie before as many up rows: a partition's."""
        return self.part_width

    @property
    def part_rows(self) -> int:
        """Rows that a partition multiplies."""
        return 64

    @property
    def part_columns(self) -> int:
        """Rows of weights that a partition multiplies them with."""
        return self.bn if self.by_rows else self.bn // 2

    @property
    def part_width(self) -> int:
        """Output columns of a partition."""
        return self.part_columns // 2 if self.paired else self.part_columns

    @property
    def stored(self) -> int:
        """Columns that are stored at a time."""
        return 32

    @property
    def mma(self) -> Any:
        """Accumulators [part_rows, part_columns] of a partition."""
        return gl.NVMMADistributedLayout([3, 0], [MULTIPLY_WARPS, 1], [16, self.part_columns, 16])

    @property
    def out(self) -> Any:
        """[part_rows, stored] to be stored, 16 bytes of a row a lane."""
        return gl.BlockedLayout([1, 8], [8, 4], [MULTIPLY_WARPS, 1], [1, 0])

    @property
    def copies(self) -> Any:
        """[rows, STEP] copied 16 bytes a lane by the copying warps."""
        return gl.BlockedLayout([1, 8], [4, 8], [COPY_WARPS, 1], [1, 0])

    @property
    def swizzled(self) -> Any:
        return gl.NVMMASharedLayout(128, 16, 2)
