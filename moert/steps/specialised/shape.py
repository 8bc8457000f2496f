"""What a warp-specialised kernel is compiled for: one GEMM's sizes, its tile, the layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

COPY_WARPS = 4
COPY_REGISTERS = 136
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
        """Shared memory: the ring and its barriers."""
        return self.stages * ((self.bm + self.bn) * STEP * 2 + 16) + 1024

    @property
    def copy_warps(self) -> int:
        return COPY_WARPS

    @property
    def copy_registers(self) -> int:
        return COPY_REGISTERS

    @property
    def mma(self) -> Any:
        """Accumulators [bm, bn] of two warpgroups: over rows where there are enough, else over columns."""
        rows = 2 if self.bm == 128 else 1
        return gl.NVMMADistributedLayout(
            [3, 0], [4 * rows, 2 // rows], [16, self.bn * rows // 2, 16]
        )

    @property
    def half(self) -> int:
        """Gate rows that a warpgroup has side by side, and then as many up rows."""
        return self.bn // 2 if self.bm == 128 else self.bn // 4

    @property
    def copies(self) -> Any:
        """[rows, STEP] copied 16 bytes a lane by the copying warps."""
        return gl.BlockedLayout([1, 8], [4, 8], [COPY_WARPS, 1], [1, 0])

    @property
    def swizzled(self) -> Any:
        return gl.NVMMASharedLayout(128, 16, 2)
