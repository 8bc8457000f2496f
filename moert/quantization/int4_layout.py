"""The one packed layout of int4 matrices, which every kernel reads, and the way in and out of it.

A block of 16 rows and 64 columns is 512 bytes: 32 lanes of 4 words of 8 codes. It is the first operand of
four m16n8k16 matrix instructions as each lane of a warp holds it (PTX ISA, "Matrix Fragments for mma.m16n8k16
with floating point type"), so that a lane loads its 16 bytes at once and feeds the instruction from
registers, without a shuffle. With lane = 4 * g + c, g in 0..7 and c in 0..3:

    word j in 0..3 holds columns 16 j .. 16 j + 15;
    value (v2, v1, v0), one bit each, is row 8 * v1 + g, column 16 * j + 8 * v2 + 2 * c + v0,
    in bits 4 * p .. 4 * p + 3 with p = 2 * v2 + v1 + 4 * v0.

Neighbouring columns (v0 = 0, 1) are 16 bits apart: a word shifted right by 4 * (2 * v2 + v1) and ANDed with
0x000F000F has the pair in its two halves, where an OR with a magic exponent makes two numbers of them. A lane
that multiplies without matrix instructions finds 2 rows of 16 columns of a block in its words.

Codes are raw, 0..15. Rows and columns that fill up the last blocks have codes that mean zero, and scale 0
where a row is filled up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch

from moert.config import Quant

ROWS: Final = 16  # of a block
COLUMNS: Final = 64
ZERO: Final = 8  # the zero point of symmetric codes


@dataclass(frozen=True, eq=False, slots=True)
class Int4Matrix:
    """The int4 matrices [E, N, K] of a layer's experts, packed; see the module docstring for a block.

    NT = ceil(N / 16) tiles of rows, KT = ceil(K / 64) blocks of columns, GN = ceil(K / group_size) groups.

    Args:
        codes: [E, NT, KT, 32, 4] int32.
        scales: [E, NT, GN, 16] of the activations' dtype; a weight is (code - zero point) * scale.
        zeros: like scales, whole numbers 0..15; None means 8 everywhere.
        rows: N.
        columns: K.
        group_size: columns of a group; K rounded up to whole blocks where a row is one group.
        paired: N = 2I rows, gate then up: tile t holds gate rows 8t..8t+7, then up rows 8t..8t+7, so that a
            lane holds both of an output column (v1 = 0, 1). Otherwise tile t holds rows 16t..16t+15.
        permutation: [E, K] int32: stored column k is multiplied by input column permutation[e, k]; None where
            columns are stored in their own order.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    rows: int
    columns: int
    group_size: int
    paired: bool
    permutation: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[E, N, K], the logical one."""
        return torch.Size((self.codes.shape[0], self.rows, self.columns))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that it multiplies."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if isinstance(value, torch.Tensor)}

    def to(self, device: str | torch.device) -> Int4Matrix:
        """The same matrices on a device; views of themselves where they are there already."""
        moved: dict[str, Any] = {k: t.to(torch.device(device)) for k, t in self.tensors().items()}
        return replace(self, **moved)

    def clone(self) -> Int4Matrix:
        """A copy in storage of its own."""
        copied: dict[str, Any] = {k: t.clone() for k, t in self.tensors().items()}
        return replace(self, **copied)

    def __getitem__(self, expert: int) -> torch.Tensor:
        """The matrix of one expert, dequantised: [N, K] float32, rows and columns in their own order."""
        codes, scales, zeros = get_expert(self, expert)
        weight = dequantize_rows(codes, scales, zeros, self.group_size)
        if self.permutation is None:
            return weight
        ordered = torch.empty_like(weight)
        ordered[:, self.permutation[expert].long()] = weight
        return ordered


def columns_per_group(group_size: int, columns: int) -> int:
    """`Int4Matrix.group_size` for a `Quant.group_size`, of a matrix with K columns."""
    return -(-columns // COLUMNS) * COLUMNS if group_size == -1 else group_size


def empty_matrix(
    experts: int,
    rows: int,
    columns: int,
    quant: Quant,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    paired: bool,
    permuted: bool = False,
) -> Int4Matrix:
    """An `Int4Matrix` of uninitialised tensors, to be filled by `put_expert`.

    Args:
        rows: N; even if `paired`.
        columns: K.
        dtype: of the activations.
        permuted: it has a permutation.
    """
    group = columns_per_group(quant.group_size, columns)
    tiles, blocks, groups = -(-rows // ROWS), -(-columns // COLUMNS), -(-columns // group)
    scales = torch.empty(experts, tiles, groups, ROWS, dtype=dtype, device=device)
    return Int4Matrix(
        torch.empty(experts, tiles, blocks, 32, 4, dtype=torch.int32, device=device),
        scales,
        None if quant.symmetric else torch.empty_like(scales),
        rows,
        columns,
        group,
        paired,
        torch.empty(experts, columns, dtype=torch.int32, device=device) if permuted else None,
    )


def put_expert(
    matrix: Int4Matrix,
    expert: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
) -> None:
    """Pack the matrix of one expert in place; the extra memory is a few times that of `codes`.

    Args:
        codes: [N, K] uint8, 0..15, columns as they are to be stored, on any device.
        scales, zeros: [N, GN], any dtype that converts; zeros of a symmetric matrix are not given.
        permutation: [K], see `Int4Matrix`; None for none where the matrix has one is the identity.
    """
    device, k = matrix.device, matrix.columns
    codes, scales = codes.to(device), scales.to(device)
    tiled = _tile(matrix, codes, matrix.codes.shape[2] * COLUMNS, ZERO)
    matrix.scales[expert].copy_(_group_tiles(matrix, scales, 0))
    if matrix.zeros is not None:
        assert zeros is not None
        zeros = zeros.to(device)
        matrix.zeros[expert].copy_(_group_tiles(matrix, zeros, ZERO))
        # what fills up a row means zero: the zero point of the row's last group
        last = _tile(matrix, zeros[:, -1:].to(torch.uint8), 1, ZERO)
        tiled[:, k:] = last
    matrix.codes[expert].copy_(_to_words(tiled))
    if matrix.permutation is not None:
        if permutation is None:
            permutation = torch.arange(k, device=device)
        matrix.permutation[expert].copy_(permutation)


def get_expert(
    matrix: Int4Matrix, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes [N, K] uint8, scales [N, GN], zeros [N, GN] or None) of one expert: what was put in."""
    codes = _untile(matrix, _from_words(matrix.codes[expert]))[:, : matrix.columns]
    scales = _untile(matrix, matrix.scales[expert].transpose(1, 2).flatten(0, 1))
    if matrix.zeros is None:
        return codes, scales, None
    return codes, scales, _untile(matrix, matrix.zeros[expert].transpose(1, 2).flatten(0, 1))


def dequantize(matrix: Int4Matrix) -> torch.Tensor:
    """The weights [E, N, K] in float32, rows and columns in their own order (gate rows, then up rows)."""
    weights = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
    for e in range(matrix.shape[0]):
        weights[e] = matrix[e]
    return weights


def dequantize_rows(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """(code - zero point) * scale in float32.

    Args:
        codes: [N, K] uint8. scales, zeros: [N, GN]; zeros None for 8.
        group_size: columns of a group.

    Returns:
        [N, K].
    """
    rows, columns = codes.shape
    groups = scales.shape[1]
    weight = torch.empty(rows, groups * group_size, dtype=torch.float32, device=codes.device)
    weight[:, :columns] = codes
    grouped = weight.view(rows, groups, group_size)
    grouped.sub_(ZERO if zeros is None else zeros.float().unsqueeze(2))
    grouped.mul_(scales.float().unsqueeze(2))
    return weight[:, :columns]


def _to_words(tiled: torch.Tensor) -> torch.Tensor:
    """Codes [NT * 16, KT * 64] uint8 as words [NT, KT, 32, 4] int32."""
    low, high = tiled.view(-1, 2, 8, tiled.shape[1]).unbind(1)  # v1
    # bytes of a number lie in memory lowest first on every machine that torch runs on
    pairs = (low | high << 4).view(torch.int16)  # [NT, 8, KT * 32], both v0
    first, second = pairs.view(*low.shape[:2], -1, 4, 2, 4).to(torch.int32).unbind(4)  # v2
    words = first & 0xFF | (second & 0xFF) << 8 | (first & 0xFF00) << 8 | (second & 0xFF00) << 16
    return words.permute(0, 2, 1, 4, 3).flatten(2, 3)  # tile g block j c -> tile block g c j


def _from_words(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `_to_words`."""
    tiles, blocks = words.shape[:2]
    words = words.view(tiles, blocks, 8, 4, 4).permute(0, 2, 1, 4, 3).contiguous()
    first = words & 0xFF | words >> 8 & 0xFF00
    second = words >> 8 & 0xFF | words >> 16 & 0xFF00
    pairs = torch.stack((first, second), dim=4).to(torch.int16)  # tile g block j v2 c
    octets = pairs.view(tiles, 8, -1).view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=1).view(tiles * ROWS, -1)


def _tile(matrix: Int4Matrix, rows: torch.Tensor, columns: int, fill: int) -> torch.Tensor:
    """[N, k] as [NT * 16, columns] in the order of the tiles, filled up."""
    tiles, halves = matrix.codes.shape[1], 2 if matrix.paired else 1
    n = matrix.rows // halves
    filled = rows.new_full((halves, tiles * ROWS // halves, columns), fill)
    filled[:, :n, : rows.shape[1]] = rows.view(halves, n, -1)
    by_tile = filled.view(halves, tiles, ROWS // halves, columns).transpose(0, 1)
    return by_tile.reshape(tiles * ROWS, columns)


def _untile(matrix: Int4Matrix, tiled: torch.Tensor) -> torch.Tensor:
    """[NT * 16, k] in the order of the tiles as [N, k]."""
    tiles, halves = matrix.codes.shape[1], 2 if matrix.paired else 1
    by_half = tiled.view(tiles, halves, ROWS // halves, -1).transpose(0, 1)
    filled = by_half.reshape(halves, tiles * ROWS // halves, -1)
    return filled[:, : matrix.rows // halves].reshape(matrix.rows, -1)


def _group_tiles(matrix: Int4Matrix, groups: torch.Tensor, fill: int) -> torch.Tensor:
    """[N, GN] as [NT, GN, 16]."""
    tiled = _tile(matrix, groups.contiguous(), groups.shape[1], fill)
    return tiled.view(-1, ROWS, groups.shape[1]).transpose(1, 2)
