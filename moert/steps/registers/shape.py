"""What a kernel that streams int4 weights through registers is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from moert.steps.fixed_point.layout import STEP
from moert.steps.streaming.shape import StreamShape


@dataclass(frozen=True)
class RegisterShape(StreamShape):
    """A `StreamShape` of int4 weights whose ring is of registers, `stages` steps that a lane holds, and whose
    inputs, one row or one token's, are staged whole as fixed-point numbers."""

    def __post_init__(self) -> None:
        # what follows, and the kernels, count on it
        assert self.int4 and self.row_warps == self.repeats == self.together == 1 and self.bm == 8

    @property
    def span(self) -> int:
        """Columns multiplied at a time: those whose inputs share an exponent."""
        return min(STEP, self.width)

    @property
    def spans(self) -> int:
        """Of a step."""
        return self.width // self.span

    @property
    def sub(self) -> int:
        """Groups within a span, 1, 2 or 4."""
        return max(1, self.span // self.group)

    @property
    def scaled(self) -> int:
        """Spans of a step with scales of their own."""
        return self.parts // self.sub

    @property
    def turns(self) -> int:
        """Times round the registers."""
        return -(-self.iterations // self.stages)

    @property
    def asked(self) -> int:
        """Iterations whose weights are asked for, as a power of two."""
        return 1 << ((self.turns + 1) * self.stages - 1).bit_length()

    @property
    def held_words(self) -> int:
        """Registers of a lane for weights on their way."""
        return self.stages * self.row_tiles * self.blocks * 4

    @property
    def staged_inputs(self) -> int:
        """Inputs that pass through a lane."""
        return self.staged * self.width // 32

    def shared_bytes(self, staged: bool = True) -> int:
        """Shared memory: numbers, what is kept beside them, all scales and zero points, and the parts' sums,
        which meet there at the end."""
        steps = self.staged * self.split
        numbers = steps * (self.width * 2 + self.spans * (1 + self.sub) * 4)
        values = steps * self.parts * self.rows * 2 * (1 + self.zeros)
        tables = self.asked * self.split * 8 if self.slots else 0
        return numbers + values + self.split * self.rows * 4 + tables

    @property
    def a8(self) -> Any:
        """First operand of m16n8k32, of bytes."""
        return gl.DotOperandLayout(0, self.mma, 4)

    @property
    def b8(self) -> Any:
        return gl.DotOperandLayout(1, self.mma, 4)

    @property
    def line(self) -> Any:
        """Inputs [staged, split, width], 16 neighbouring columns in a lane: what four lanes read is made of
        them."""
        lanes = min(32, self.width // 16)
        return gl.BlockedLayout([1, 1, 16], [32 // lanes, 1, lanes], [1, self.split, 1], [2, 1, 0])

    @property
    def all_values(self) -> Any:
        """Scales or zero points of all steps [staged * parts * split, rows], copied 16 bytes a lane."""
        lanes = min(32, self.rows // 8)
        return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [self.warps, 1], [1, 0])

    @property
    def halves(self) -> Any:
        """[row_tiles, 2, 8], rows 0 to 7 of each tile and rows 8 to 15."""
        return gl.BlockedLayout([1, 1, 1], [2, 2, 8], [self.warps, 1, 1], [2, 1, 0])
