"""What the packed int4 formats have in common: tensors with suffixes, codes, scales, zero points, groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Final, NamedTuple

import torch

from moert.checkpoint.files import FLOATS as FLOATS
from moert.checkpoint.files import TensorFiles
from moert.checkpoint.packing import Packing
from moert.errors import WeightsError
from moert.quantization.int4_layout import columns_per_group

Parts = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]

INTS: Final = ("I32", "I64")


class Part(NamedTuple):
    """One tensor of a packed matrix: what its header has to say."""

    dtypes: tuple[str, ...]
    shape: Shape


class Decoded(NamedTuple):
    """One matrix: codes [N, K] uint8, scales [N, GN], zeros [N, GN] uint8 or None for 8.

    order: [K] int64: column order[i] belongs at i, so that the columns of a group lie together; codes are in
    that order already. None where they were.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None


class PackedFormat(ABC):
    """How one format keeps a matrix [N, K] in tensors `<base>.<suffix>`.

    Class attributes:
        main: the suffix that tells a packed matrix.
        group_index: the suffix of the group of every column; optional.
    """

    main: ClassVar[str]
    group_index: ClassVar[str | None] = None

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def groups(self, k: int) -> int:
        """GN of a matrix with K columns."""
        return -(-k // columns_per_group(self.packing.quant.group_size, k))

    @abstractmethod
    def parts(self, base: str, n: int, k: int) -> dict[str, Part]:
        """The tensors that have to be there, by suffix.

        Raises:
            WeightsError: matrices of that shape cannot be stored.
        """

    @abstractmethod
    def shape(self, files: TensorFiles, base: str) -> tuple[int, int]:
        """(N, K) of a matrix as its own tensors tell it."""

    @abstractmethod
    def unpack(
        self, base: str, parts: Parts, n: int, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(codes [N, K] uint8, scales [N, GN], zeros [N, GN] uint8 or None), columns as they are stored.

        Raises:
            WeightsError: values outside their range.
        """

    def order(self, base: str, parts: Parts, k: int) -> torch.Tensor | None:
        """`Decoded.order`.

        Raises:
            WeightsError: groups that do not exist, or not of one size.
        """
        if self.group_index is None or self.group_index not in parts:
            return None
        index = parts[self.group_index].long()
        size, count = columns_per_group(self.packing.quant.group_size, k), self.groups(k)
        name = f"{base}.{self.group_index}"
        if int(index.min()) < 0 or int(index.max()) >= count:
            raise WeightsError(
                f"{name}: groups {int(index.min())}..{int(index.max())}, need 0..{count - 1}"
            )
        order = index.argsort(stable=True)
        own = torch.arange(k, device=index.device)
        wanted = own // size
        if not torch.equal(index[order], wanted):
            group = int(index[order][index[order] != wanted][0])
            raise WeightsError(
                f"{name}: group {group} has {int((index == group).sum())} columns, need groups of {size}"
            )
        return None if torch.equal(order, own) else order

    def index(self, files: TensorFiles, base: str) -> Parts:
        """The group of every column, where there is such a tensor."""
        name = f"{base}.{self.group_index}"
        if self.group_index is None or name not in files:
            return {}
        return {self.group_index: files.read(name, dtypes=INTS)}

    def read(self, files: TensorFiles, base: str, n: int, k: int) -> Decoded:
        """A matrix [N, K] from its tensors.

        Raises:
            WeightsError, UnsupportedError: a tensor is missing, of another shape or dtype, or its values are
                outside their range.
        """
        parts = {**self.index(files, base)}
        for suffix, part in self.parts(base, n, k).items():
            name = f"{base}.{suffix}"
            if name not in files:
                raise WeightsError(f"{name}: missing from {files.path}")
            if files.shape(name) != part.shape:
                raise WeightsError(
                    f"{name}: shape {list(files.shape(name))}, need {list(part.shape)}"
                )
            parts[suffix] = files.read(name, dtypes=part.dtypes)
        codes, scales, zeros = self.unpack(base, parts, n, k)
        order = self.order(base, parts, k)
        return Decoded(codes if order is None else codes[:, order], scales, zeros, order)


def multiple_of_8(base: str, method: str, **sizes: int) -> None:
    """Refuse sizes that whole words of eight codes cannot hold.

    Raises:
        WeightsError: the size.
    """
    for name, size in sizes.items():
        if size % 8:
            raise WeightsError(f"{base}: {size} {name}, need a multiple of 8 for {method}'s words")
