"""How the weights of an expert are cut into tiles, for kernels that read them by the tile."""

from __future__ import annotations

BLOCK = 64  # columns of a block, `moert/quantization/int4_layout.py`
ROWS = 16  # of a row tile; where gate and up rows are paired, 8 of each


class WeightTiles:
    """Counts of blocks, groups and tiles, for a dataclass that has these fields."""

    reduction: int
    columns: int
    paired: bool
    group: int

    @property
    def row_blocks(self) -> int:
        """KT, blocks of a row."""
        return -(-self.reduction // BLOCK)

    @property
    def groups(self) -> int:
        """GN, groups of a row of int4 weights."""
        return -(-self.reduction // self.group)

    @property
    def all_tiles(self) -> int:
        """NT, row tiles of an expert."""
        return -(-self.columns // (ROWS // 2 if self.paired else ROWS))
