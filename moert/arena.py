"""One allocation for all scratch of all buckets, made before any capture, never moved, never
grown.

Plans never run at the same time (the share group serialises them), so every plan's fields start at
offset zero and the arena is as large as the largest plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

ALIGNMENT = 256  # bytes: what device allocators give, and a multiple of every vector width


class Field(NamedTuple):
    """One array of a plan: name, shape, dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(fields: Iterable[Field]) -> tuple[dict[str, int], int]:
    """Byte offset of each field, aligned, in the given order; and the total in bytes."""
    offsets: dict[str, int] = {}
    end = 0
    for field in fields:
        offsets[field.name] = end
        end += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def absent_views(fields: Iterable[Field]) -> dict[str, torch.Tensor]:
    """Stand-ins for the views of an arena that is not there: on the meta device, as aligned as those."""
    return {f.name: torch.empty(f.shape, dtype=f.dtype, device="meta") for f in fields}


class Arena:
    """Scratch of fixed size on one device.

    Args:
        device: where.
        nbytes: the largest `layout(...)` total it will be asked for.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._storage = torch.empty(max(nbytes, ALIGNMENT), dtype=torch.uint8, device=device)
        self.nbytes = self._storage.numel()

    def views(self, fields: Iterable[Field]) -> dict[str, torch.Tensor]:
        """Typed views of the fields; the same fields give the same addresses every time.

        Raises:
            ValueError: more than the arena holds (a bug in the caller's sizing).
        """
        fields = list(fields)
        offsets, total = layout(fields)
        if total > self.nbytes:
            raise ValueError(f"arena of {self.nbytes} bytes asked for {total}")
        return {
            f.name: self._storage[offsets[f.name] : offsets[f.name] + f.nbytes]
            .view(f.dtype)
            .view(f.shape)
            for f in fields
        }

    def poison(self) -> None:
        """Fill with ones: NaN in every float format, -1 in every integer one. For tests."""
        self._storage.fill_(0xFF)

    def contains(self, tensor: torch.Tensor) -> bool:
        start = self._storage.data_ptr()
        return start <= tensor.data_ptr() < start + self.nbytes
