"""What a warp-specialised kernel of tall blocks is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from moert.steps.specialised.shape import MULTIPLY_WARPS, STEP, SpecialisedShape

FIRST, SECOND = 128, 32  # rows of the first product of a block, and of the second
TALL = FIRST + SECOND  # BM


@dataclass(frozen=True)
class TallShape(SpecialisedShape):
    """Blocks of 128 + 32 rows, which are two products out^T = w x^T: each is of a power of two.

    The partitions share the tile's rows of weights, of which gate and up alternate in groups of 8, so that a
    thread has both of an output column.
    """

    @property
    def first(self) -> int:
        return FIRST

    @property
    def fewer(self) -> int:
        """Rows that are multiplied where a block has no more, and so on."""
        return self.first

    @property
    def fewest(self) -> int:
        return self.first // 2

    @property
    def spare(self) -> bool:
        """Whether registers are left for what is loaded ahead of all products of a tile."""
        return True

    @property
    def by_rows(self) -> bool:
        return False

    @property
    def group(self) -> int:
        return 8

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.part_columns * self.bm // (32 * MULTIPLY_WARPS)

    @property
    def shared_bytes(self) -> int:
        """Shared memory: the ring, its barriers, and what results pass through on their way out."""
        return self.stages * ((self.bm + self.bn) * STEP * 2 + 16) + 4096 + 1024

    @property
    def registers(self) -> list[int]:
        return [200, 104] if self.sums > 128 else [168, 168]

    @property
    def stored(self) -> int:
        """Slots that are stored at a time."""
        return 32

    def accumulators(self, n: int) -> Any:
        """[part_columns, n] of a partition."""
        return gl.NVMMADistributedLayout([3, 0], [MULTIPLY_WARPS, 1], [16, n, 16])

    @property
    def out(self) -> Any:
        """[columns, n] to be stored, 16 bytes of a row a lane."""
        return gl.BlockedLayout([8, 1], [8, 4], [1, MULTIPLY_WARPS], [0, 1])
