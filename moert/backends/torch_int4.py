"""`rows @ weight.T + bias` with one expert's int4 weights, into given rows, without allocating a tensor.

Weights are dequantised to float32 a piece of 1 MiB at a time, almost in the order in which their bytes lie in
a block (see `moert.quantization.int4_layout`): the columns of the rows are brought into the same order once,
which is cheaper than putting every weight into its place. Of the columns of a half block, all of one group,
that order is c, then the words j, then the bytes (v0, v2). Products and sums are float32 for every dtype.
"""

from __future__ import annotations

from typing import Final

import torch

from moert.arena import Field
from moert.quantization.int4_layout import COLUMNS, ROWS, ZERO, Int4Matrix

PIECE_NUMEL: Final = 1 << 18  # weights in float32: 1 MiB, a core's cache
HALF: Final = 32  # columns: no group ends inside half a block


def int4_fields(shapes: list[tuple[int, int]], rows: int, dtype: torch.dtype) -> tuple[Field, ...]:
    """The scratch that `Int4Linear`s of these (N, K) share, for up to `rows` rows at a time."""
    f32 = torch.float32
    tiles = [(_piece_tiles(n, k), _blocks(k) * COLUMNS) for n, k in shapes]
    weights = max(t * ROWS * wide for t, wide in tiles)
    outputs = max(t * ROWS for t, _ in tiles)
    deepest = max(k for _, k in shapes)
    groups = max(t * ROWS * wide for t, wide in tiles) // HALF
    return (
        Field("int4_octets", (weights // 2,), torch.uint8),  # a byte is two codes
        Field("int4_codes", (weights // 2,), torch.uint8),
        Field("int4_weights", (weights,), f32),
        Field("int4_groups", (groups,), f32),  # scales or zero points as they are stored
        Field("int4_spread", (groups,), f32),  # one for each half of a block
        Field("int4_rows", (rows * _blocks(deepest) * COLUMNS,), f32),
        Field("int4_gathered", (rows * deepest,), dtype),
        Field("int4_tail", (rows * COLUMNS,), f32),
        Field("int4_out", (rows * outputs,), f32),
        Field("int4_bias", (max(n for n, _ in shapes),), f32),
    )


class Int4Linear:
    """The linear maps of E experts.

    Args:
        weight: int4 [E, N, K]; only viewed, so that in-place updates are seen.
        bias: [E, N] of any floating dtype, or None.
        scratch: the tensors that `int4_fields` names.
        like: another one of the same tensors; its views serve both.
    """

    def __init__(
        self,
        weight: Int4Matrix,
        bias: torch.Tensor | None,
        scratch: dict[str, torch.Tensor],
        like: Int4Linear | None = None,
    ) -> None:
        _, self.n, self.k = weight.shape
        self.matrix, self.bias, self.scratch = weight, bias, scratch
        self.tiles, self.blocks = weight.codes.shape[1:3]
        self.piece = _piece_tiles(self.n, self.k)
        # numbers would become tensors in every call
        self.shift, self.mask = torch.tensor([4, 0x0F0F0F0F], dtype=torch.int32, device="cpu")
        self.zero = torch.tensor(ZERO, dtype=torch.int8, device="cpu")
        self.eights: tuple[torch.Tensor, ...]
        self.group_of_half: torch.Tensor
        if like is not None:
            self.eights, self.group_of_half = like.eights, like.group_of_half
            return
        # tile block g c, half of the words j: eight bytes of two rows each
        eights = weight.codes.view(torch.int64)
        self.eights = eights.view(*weight.codes.shape[:3], 8, 4, 2).unbind(0)
        halves = torch.arange(2 * self.blocks, device="cpu") * HALF // weight.group_size
        self.group_of_half = halves.clamp_(max=weight.scales.shape[2] - 1)

    def __call__(self, expert: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`out[i] = weight[expert] @ rows[i] + bias[expert]`.

        Args:
            rows: [n, K], n >= 1, contiguous, floating; of the layer's dtype where columns are permuted.
            out: [n, N], contiguous, floating.
        """
        n = rows.shape[0]
        ordered = self._ordered_rows(expert, rows)  # [n, KT * 64]
        bias = None
        if self.bias is not None:
            bias = self.scratch["int4_bias"][: self.n].copy_(self.bias[expert])
        # rows of a tile that belong together: all 16, or 8 gate rows and 8 up rows
        halves = 2 if self.matrix.paired else 1
        height, length = ROWS // halves, self.n // halves
        for start in range(0, self.tiles, self.piece):
            stop = min(start + self.piece, self.tiles)
            weight = self._dequantized(expert, start, stop)  # [halves * tiles * height, KT * 64]
            product = self.scratch["int4_out"][: n * weight.shape[0]].view(n, -1)
            torch.mm(ordered, weight.t(), out=product)
            first, last = start * height, min(stop * height, length)
            for half, columns in enumerate(product.view(n, halves, -1).unbind(1)):
                result = columns[:, : last - first]
                here = slice(half * length + first, half * length + last)
                if bias is not None:
                    result.add_(bias[here])
                out[:, here].copy_(result)

    def _ordered_rows(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """The rows in float32, columns in the order of the weights, filled up with zeros."""
        n, k = rows.shape
        if self.matrix.permutation is not None:
            gathered = self.scratch["int4_gathered"][: n * k].view(n, k)
            rows = torch.index_select(rows, 1, self.matrix.permutation[expert], out=gathered)
        ordered = self.scratch["int4_rows"][: n * self.blocks * COLUMNS]
        ordered = ordered.view(n, self.blocks, 2, 4, 2, 2, 2)  # half c j v0 v2
        whole = k // COLUMNS
        if whole:
            _reorder(rows[:, : whole * COLUMNS], ordered[:, :whole])
        if whole < self.blocks:
            tail = self.scratch["int4_tail"][: n * COLUMNS].view(n, COLUMNS).zero_()
            tail[:, : k - whole * COLUMNS].copy_(rows[:, whole * COLUMNS :])
            _reorder(tail, ordered[:, whole:])
        return ordered.view(n, -1)

    def _dequantized(self, expert: int, start: int, stop: int) -> torch.Tensor:
        """The weights of some tiles, [rows, KT * 64] float32; of a paired matrix gate rows, then up rows."""
        matrix, tiles, blocks = self.matrix, stop - start, self.blocks
        size = tiles * blocks * 8 * COLUMNS
        octets, codes = self.scratch["int4_octets"][:size], self.scratch["int4_codes"][:size]
        # tile g block half c
        ordered = octets.view(torch.int64).view(tiles, 8, blocks, 2, 4)
        ordered.copy_(self.eights[expert][start:stop].permute(0, 2, 1, 4, 3))
        weights = self.scratch["int4_weights"][: 2 * size]
        if matrix.paired:
            parts = weights.view(2, tiles, 8 * blocks * COLUMNS).unbind(0)
        else:
            parts = weights.view(tiles, 2, 8 * blocks * COLUMNS).unbind(1)
        for v1, part in enumerate(parts):
            # four bytes at a time: torch shifts single bytes one by one
            words, both = codes.view(torch.int32), octets.view(torch.int32)
            if v1:
                both = torch.bitwise_right_shift(both, self.shift, out=words)
            torch.bitwise_and(both, self.mask, out=words)
            signed = codes.view(torch.int8)
            if matrix.zeros is None:
                signed.sub_(self.zero)
            part.copy_(signed.view(tiles, -1))
        halves = weights.view(-1, 2 * blocks, HALF)
        if matrix.zeros is not None:
            halves.sub_(self._spread(matrix.zeros[expert, start:stop]))
        halves.mul_(self._spread(matrix.scales[expert, start:stop]))
        return weights.view(-1, blocks * COLUMNS)

    def _spread(self, groups: torch.Tensor) -> torch.Tensor:
        """Scales or zero points [tiles, GN, 16] for every half block of every row: [rows, 2 * KT, 1]."""
        tiles, count, _ = groups.shape
        stored = self.scratch["int4_groups"][: groups.numel()]
        if self.matrix.paired:
            stored.view(2, tiles, 8, count).copy_(
                groups.view(tiles, count, 2, 8).permute(2, 0, 3, 1)
            )
        else:
            stored.view(tiles, ROWS, count).copy_(groups.transpose(1, 2))
        rows = tiles * ROWS
        spread = self.scratch["int4_spread"][: rows * 2 * self.blocks].view(rows, -1)
        torch.index_select(stored.view(rows, count), 1, self.group_of_half, out=spread)
        return spread.unsqueeze(2)


def _reorder(rows: torch.Tensor, into: torch.Tensor) -> None:
    """[n, 64 b] in their own order (half j v2 c v0) into [n, b, half, c, j, v0, v2]."""
    blocks = into.shape[1]
    into.copy_(rows.unflatten(1, (blocks, 2, 2, 2, 4, 2)).permute(0, 1, 2, 5, 3, 6, 4))


def _blocks(columns: int) -> int:
    return -(-columns // COLUMNS)


def _piece_tiles(n: int, k: int) -> int:
    """Tiles that are dequantised together, of matrices [N, K]."""
    return max(1, min(-(-n // ROWS), PIECE_NUMEL // (ROWS * _blocks(k) * COLUMNS)))
