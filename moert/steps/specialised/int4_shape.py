"""What a warp-specialised int4 kernel is compiled for: one GEMM's weights, tile, layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from moert.steps.specialised.shape import COPY_WARPS
from moert.steps.weight_tiles import BLOCK, ROWS, WeightTiles


@dataclass(frozen=True)
class SpecialisedInt4Shape(WeightTiles):
    """A compile-time constant of the kernels; its properties are constants there too.

    Args:
        zeros: with zero points of their own rather than 8.
        group: columns of a group.
        reduction: columns of a weight's row.
        columns: columns of the output, N.
        paired: output columns have a gate and an up row of the weights.
        bm: rows of inputs, 32 to 160: a power of two, or that and a quarter of it.
        bn: rows of weights a program takes, half of them each multiplying partition.
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
    bn: int
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
        codes = self.bn * self.step // 2
        values = self.bn * 2 * self.step_groups * (1 + self.zeros)
        ring = self.stages * (codes + values + self.bm * self.step * 2 + 16)
        return ring + 2048 * self.warps + 256

    @property
    def tiles(self) -> int:
        """Pieces that the rows of an expert are cut into."""
        return -(-self.all_tiles // (2 * self.row_tiles))

    @property
    def row_tiles(self) -> int:
        """Of a multiplying partition."""
        return self.bn // (2 * ROWS)

    @property
    def width(self) -> int:
        """Output columns of a tile."""
        return self.bn // 2 if self.paired else self.bn

    @property
    def by_rows(self) -> bool:
        return False

    @property
    def part_columns(self) -> int:
        """Rows of weights of a partition."""
        return self.bn // 2

    @property
    def part_width(self) -> int:
        """Output columns of a partition."""
        return self.width // 2

    @property
    def workers(self) -> list[int]:
        return [self.warps, COPY_WARPS]

    @property
    def registers(self) -> list[int]:
        if self.second:
            return [200, 112]
        return [200, 104] if self.warps == 4 else [104, 64]

    @property
    def first(self) -> int:
        """Rows of a block that are the columns of the first product of a step: the largest power of two."""
        return int(1 << (self.bm.bit_length() - 1))

    @property
    def second(self) -> int:
        """Those of the second one, of the same weights; none in a block of a power of two."""
        return self.bm - self.first

    @property
    def fewer(self) -> int:
        """Rows that are multiplied where a block has no more, and so on."""
        return self.first if self.second else max(16, self.bm // 2)

    @property
    def fewest(self) -> int:
        return max(16, self.fewer // 2)

    def sums(self, n: int) -> int:
        """Accumulators of a thread for n rows."""
        return self.part_columns * n // (32 * self.warps)

    @property
    def spare(self) -> bool:
        """Whether registers are left for what is loaded ahead of all products of a tile."""
        return self.warps == 4 and self.bm < 128 and not self.second

    def pinned(self, n: int) -> bool:
        """Whether they are left for weights that are widened while the products of n rows are under way."""
        return self.halves == 2 and self.sums(n) <= 80

    def accumulators(self, n: int) -> Any:
        """[part_columns, n] of one partition; row tiles go round its warps."""
        return gl.NVMMADistributedLayout([3, 0], [self.warps, 1], [16, n, 16])

    def a(self, n: int) -> Any:
        return gl.DotOperandLayout(0, self.accumulators(n), 2)

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
        """Inputs [rows, 64], copied 16 bytes a lane."""
        return gl.BlockedLayout([1, 8], [4, 8], [COPY_WARPS, 1], [1, 0])

    @property
    def copy_values(self) -> Any:
        """Scales or zero points [step_groups, bn], copied 4 bytes a lane."""
        return gl.BlockedLayout([1, 2], [1, 32], [1, COPY_WARPS], [1, 0])

    @property
    def swizzled(self) -> Any:
        return gl.NVMMASharedLayout(128, 16, 2)

    @property
    def out(self) -> Any:
        """[part_width, n] to be stored, 16 bytes of a row a lane."""
        lanes = min(8, self.part_width // 8)
        return gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, self.warps], [0, 1])

    def plain(self, rank: int) -> Any:
        """Shared memory in order, as lanes read back what they wrote."""
        return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])
