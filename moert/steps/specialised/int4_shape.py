"""What a warp-specialised int4 kernel is compiled for: one GEMM's weights, tile, layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from moert.steps.specialised.shape import COPY_WARPS
from moert.steps.weight_tiles import BLOCK, ROWS, WeightTiles

ROW_TILES = 16  # of a program, half of them each multiplying partition's


@dataclass(frozen=True)
class SpecialisedInt4Shape(WeightTiles):
    """A compile-time constant of the kernels; its properties are constants there too.

    Args:
        zeros: with zero points of their own rather than 8.
        group: columns of a group.
        reduction: columns of a weight's row.
        columns: columns of the output, N.
        paired: output columns have a gate and an up row of the weights.
        bm: rows of inputs, the instruction's columns at most: 32 to 128.
        step: columns of a stage, one block or two.
        warps: of each of the two multiplying partitions, 4 or 8.
        stages: of the ring.
        side: blocks that go through the tiles side by side.
        programs: workgroups that share all tiles.
    """

    zeros: bool
    group: int
    reduction: int
    columns: int
    paired: bool
    bm: int
    step: int
    warps: int
    stages: int
    side: int
    programs: int

    @property
    def steps(self) -> int:
        """Of a tile."""
        return -(-self.reduction // self.step)

    @property
    def halves(self) -> int:
        """Blocks of a step."""
        return self.step // BLOCK

    @property
    def parts(self) -> int:
        """Groups within a block."""
        return max(1, BLOCK // self.group)

    @property
    def step_groups(self) -> int:
        """Groups within a step."""
        return max(1, self.step // self.group)

    @property
    def shared_bytes(self) -> int:
        """Shared memory: the ring, its barriers, and what results pass through on their way out."""
        codes = 2 * self.row_tiles * ROWS * self.step // 2
        values = 2 * self.row_tiles * ROWS * 2 * self.step_groups * (1 + self.zeros)
        ring = self.stages * (codes + values + self.bm * self.step * 2 + 16)
        return ring + 2048 * self.warps + 256

    @property
    def tiles(self) -> int:
        """Pieces that the rows of an expert are cut into."""
        return -(-self.all_tiles // ROW_TILES)

    @property
    def row_tiles(self) -> int:
        """Of a multiplying partition."""
        return ROW_TILES // 2

    @property
    def width(self) -> int:
        """Output columns of a partition's tile."""
        return self.row_tiles * (8 if self.paired else ROWS)

    @property
    def workers(self) -> list[int]:
        return [self.warps, COPY_WARPS]

    @property
    def registers(self) -> list[int]:
        return [200, 104] if self.warps == 4 else [104, 64]

    @property
    def half(self) -> int:
        """Columns of the instruction where a block has rows for no more, and so on."""
        return max(16, self.bm // 2)

    @property
    def quarter(self) -> int:
        return max(16, self.bm // 4)

    @property
    def spare(self) -> bool:
        """Whether registers are left for what is loaded ahead of all products of a tile."""
        return self.warps == 4 and self.bm < 128

    def mma(self, n: int) -> Any:
        """Accumulators [row_tiles * 16, n] of one partition; row tiles go round its warps."""
        return gl.NVMMADistributedLayout([3, 0], [self.warps, 1], [16, n, 16])

    def a(self, n: int) -> Any:
        return gl.DotOperandLayout(0, self.mma(n), 2)

    @property
    def codes(self) -> Any:
        """A partition's codes [row_tiles, 32, 4] of a block: a lane has 16 bytes of each of its row tiles."""
        return gl.BlockedLayout([1, 1, 4], [1, 32, 1], [self.warps, 1, 1], [2, 1, 0])

    @property
    def copy_codes(self) -> Any:
        """All codes [2 * row_tiles, 32, 4] of a block, by the copying warps."""
        return gl.BlockedLayout([1, 1, 4], [1, 32, 1], [COPY_WARPS, 1, 1], [2, 1, 0])

    @property
    def copies(self) -> Any:
        """Inputs [bm, 64], copied 16 bytes a lane."""
        return gl.BlockedLayout([1, 8], [4, 8], [COPY_WARPS, 1], [1, 0])

    @property
    def copy_values(self) -> Any:
        """Scales or zero points [step_groups, 32 * row_tiles], copied 4 bytes a lane."""
        return gl.BlockedLayout([1, 2], [1, 32], [1, COPY_WARPS], [1, 0])

    @property
    def swizzled(self) -> Any:
        return gl.NVMMASharedLayout(128, 16, 2)

    @property
    def out(self) -> Any:
        """[width, n] to be stored, 16 bytes of a row a lane."""
        return gl.BlockedLayout([8, 1], [8, 4], [1, self.warps], [0, 1])

    def plain(self, rank: int) -> Any:
        """Shared memory in order, as lanes read back what they wrote."""
        return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])
