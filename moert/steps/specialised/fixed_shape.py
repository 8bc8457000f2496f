"""What a warp-specialised kernel of int4 weights and fixed-point inputs is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from moert.steps.fixed_point.layout import STEP, padded_columns
from moert.steps.specialised.shape import COPY_WARPS
from moert.steps.weight_tiles import ROWS, WeightTiles

PARTITIONS = 2  # that multiply, each of four warps
PIECE = 64  # rows of weights of a product: what one instruction takes
PIECES = 2  # of a partition


@dataclass(frozen=True)
class FixedShape(WeightTiles):
    """A compile-time constant of the kernels; its properties are constants there too.

    Args:
        zeros: with zero points of their own rather than 8.
        group: columns of a group, whole steps of 128.
        reduction: columns of a weight's row.
        columns: columns of the output, N.
        paired: output columns have a gate and an up row of the weights.
        bm: rows of inputs, 16 or 32: registers last for the products of two pieces.
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
    stages: int
    side: int
    programs: int

    @property
    def steps(self) -> int:
        """Of a tile, of 128 columns each."""
        return -(-self.reduction // STEP)

    @property
    def padded(self) -> int:
        """Columns of a row of inputs."""
        return padded_columns(self.reduction)

    @property
    def bn(self) -> int:
        """Rows of weights a program takes."""
        return PARTITIONS * PIECES * PIECE

    @property
    def row_tiles(self) -> int:
        """Of a program."""
        return self.bn // ROWS

    @property
    def tiles(self) -> int:
        """Pieces that the rows of an expert are cut into."""
        return -(-self.all_tiles // self.row_tiles)

    @property
    def width(self) -> int:
        """Output columns of a tile."""
        return self.bn // 2 if self.paired else self.bn

    @property
    def part_width(self) -> int:
        """Output columns of a partition."""
        return self.width // PARTITIONS

    @property
    def piece_width(self) -> int:
        """Output columns of a piece."""
        return self.part_width // PIECES

    @property
    def by_rows(self) -> bool:
        return False

    @property
    def shared_bytes(self) -> int:
        """Shared memory: the ring, its barriers, and what results pass through on their way out."""
        codes = self.bn * STEP // 2
        values = (2 * self.bn + 4 * self.bm) * (1 + self.zeros)
        ring = self.stages * (codes + values + self.bm * STEP * 2 + 16)
        return ring + PARTITIONS * 4096 + 256

    @property
    def workers(self) -> list[int]:
        return [4] * (PARTITIONS - 1) + [COPY_WARPS]

    @property
    def registers(self) -> list[int]:
        return [200] * (PARTITIONS - 1) + [104]

    @property
    def fewer(self) -> int:
        """Rows that are multiplied where a block has no more, and so on."""
        return max(8, self.bm // 2)

    @property
    def fewest(self) -> int:
        return max(8, self.bm // 4)

    @property
    def spare(self) -> bool:
        """Whether registers are left for what is loaded ahead of all products of a tile."""
        return True

    def in_twos(self, n: int) -> bool:
        """Whether a partition takes two steps together: where registers last for three products of n rows."""
        return n <= 16

    def products(self, n: int) -> Any:
        """[PIECE, 2 n] int32 of one partition: both bytes of a row of inputs side by side."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * n, 32])

    def operand(self, n: int) -> Any:
        return gl.DotOperandLayout(0, self.products(n), 4)

    @property
    def bytes(self) -> Any:
        """Codes [row tiles, 8, 4, 8, 4] of a piece as bytes: those of a word are neighbours."""
        return gl.BlockedLayout([1, 1, 1, 8, 4], [1, 8, 4, 1, 1], [4, 1, 1, 1, 1], [4, 3, 2, 1, 0])

    @property
    def codes(self) -> Any:
        """A partition's codes [row tiles, 32, 4] of a block: a lane has 16 bytes."""
        return gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0])

    @property
    def copy_codes(self) -> Any:
        """All codes [row_tiles, 32, 4] of a block, by the copying warps."""
        return gl.BlockedLayout([1, 1, 4], [1, 32, 1], [COPY_WARPS, 1, 1], [2, 1, 0])

    @property
    def copies(self) -> Any:
        """Inputs [2 * rows, 128], copied 16 bytes a lane."""
        return gl.BlockedLayout([1, 16], [4, 8], [COPY_WARPS, 1], [1, 0])

    @property
    def copy_values(self) -> Any:
        """Scales or zero points [bn], copied 4 bytes a lane."""
        return gl.BlockedLayout([2], [32], [COPY_WARPS], [0])

    @property
    def copy_worth(self) -> Any:
        """[bm] float32, copied 4 bytes a lane."""
        return gl.BlockedLayout([1], [32], [COPY_WARPS], [0])

    @property
    def swizzled(self) -> Any:
        """Inputs as the instruction reads them."""
        return gl.NVMMASharedLayout(128, 8, 2)

    @property
    def out(self) -> Any:
        """[piece_width, n] to be stored, 16 bytes of a row a lane."""
        lanes = self.piece_width // 8
        return gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, 4], [0, 1])

    def plain(self, rank: int) -> Any:
        """Shared memory in order."""
        return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])
