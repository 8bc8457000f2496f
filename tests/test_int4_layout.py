"""The packed int4 layout: where each code lies, what fills up blocks, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from moert.config import Quant
from moert.quantization.int4_layout import (
    Int4Matrix,
    columns_per_group,
    dequantize,
    empty_matrix,
    get_expert,
    put_expert,
)

E = 2
# N, K, group size, paired: halves and columns that fill no block, groups that end inside one, one row,
# fewer columns than a group, more rows than a tile
SHAPES = [
    (16, 64, 32, False),
    (24, 200, 64, False),
    (35, 24, 32, False),
    (1, 1, -1, False),
    (17, 130, 128, False),
    (48, 2880, 32, True),
    (2, 65, 96, True),
    (70, 40, -1, True),
    (400, 72, 128, True),
]


def made(
    n: int, k: int, group: int, paired: bool, symmetric: bool, permuted: bool = False
) -> tuple[Int4Matrix, list[tuple[torch.Tensor, ...]]]:
    """A matrix full of random codes, and for each expert what was put in."""
    quant = Quant("int4", group, symmetric)
    matrix = empty_matrix(E, n, k, quant, torch.float16, "cpu", paired=paired, permuted=permuted)
    for tensor in matrix.tensors().values():
        tensor.view(torch.uint8).fill_(0xFF)  # NaN, -1
    g = torch.Generator().manual_seed(n * k)
    groups = -(-k // columns_per_group(group, k))
    parts = []
    for e in range(E):
        codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
        scales = torch.rand(n, groups, generator=g).half() + 0.5
        zeros = torch.randint(0, 16, (n, groups), generator=g)
        order = torch.randperm(k, generator=g)
        put_expert(
            matrix, e, codes, scales, None if symmetric else zeros, order if permuted else None
        )
        parts.append((codes, scales, zeros, order))
    return matrix, parts


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("n", "k", "group", "paired"), SHAPES)
def test_every_code_lies_where_the_layout_says(
    n: int, k: int, group: int, paired: bool, symmetric: bool
) -> None:
    """Bit by bit from the definition, padding included."""
    matrix, parts = made(n, k, group, paired, symmetric)
    size = columns_per_group(group, k)
    groups, blocks = -(-k // size), -(-k // 64)
    tiles = -(-n // 2 // 8) if paired else -(-n // 16)
    assert matrix.codes.shape == (E, tiles, blocks, 32, 4)
    assert matrix.scales.shape == (E, tiles, groups, 16)
    codes, scales, zeros, _ = parts[1]
    tile, block, g, c, j, v2, v1, v0 = torch.meshgrid(
        *(torch.arange(m) for m in (tiles, blocks, 8, 4, 4, 2, 2, 2)), indexing="ij"
    )
    word = matrix.codes[1].long()[tile, block, 4 * g + c, j]
    stored = word >> (4 * (2 * v2 + v1) + 16 * v0) & 15
    if paired:
        inside = 8 * tile + g < n // 2
        row = torch.where(inside, v1 * (n // 2) + 8 * tile + g, 0)
    else:
        inside = 16 * tile + 8 * v1 + g < n
        row = torch.where(inside, 16 * tile + 8 * v1 + g, 0)
    column = 64 * block + 16 * j + 8 * v2 + 2 * c + v0
    real = inside & (column < k)
    wanted = codes[row, column.clamp(max=k - 1)].long()
    assert torch.equal(stored[real], wanted[real])
    beyond = inside & (column >= k)  # the padding of a row means zero
    last = torch.full_like(stored, 8) if symmetric else zeros[row, -1]
    assert torch.equal(stored[beyond], last[beyond])
    assert (stored[~inside & (column < k)] == 8).all()
    rows = torch.arange(16)
    for t in range(tiles):
        index = 8 * t + rows % 8 + rows // 8 * (n // 2) if paired else 16 * t + rows
        there = 8 * t + rows % 8 < n // 2 if paired else index < n
        assert torch.equal(matrix.scales[1, t][:, there], scales[index[there]].T)
        assert (matrix.scales[1, t][:, ~there] == 0).all()
        if not symmetric:
            assert matrix.zeros is not None
            assert torch.equal(matrix.zeros[1, t][:, there].long(), zeros[index[there]].T)
            assert (matrix.zeros[1, t][:, ~there] == 8).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("n", "k", "group", "paired"), SHAPES)
def test_what_was_put_in_comes_out(
    n: int, k: int, group: int, paired: bool, symmetric: bool
) -> None:
    matrix, parts = made(n, k, group, paired, symmetric)
    assert (matrix.zeros is None) == symmetric
    weights = dequantize(matrix)
    assert matrix.shape == weights.shape == (E, n, k) and weights.dtype is torch.float32
    size = columns_per_group(group, k)
    for e, (codes, scales, zeros, _) in enumerate(parts):
        got_codes, got_scales, got_zeros = get_expert(matrix, e)
        assert torch.equal(got_codes, codes) and torch.equal(got_scales, scales)
        if got_zeros is not None:
            assert torch.equal(got_zeros.long(), zeros)
        columns = torch.arange(k) // size
        zero = 8 if symmetric else zeros[:, columns]
        expected = (codes.float() - zero) * scales.float()[:, columns]
        assert torch.equal(weights[e], expected)
        assert torch.equal(matrix[e], expected)


def test_permuted_columns_come_out_in_their_own_order() -> None:
    plain, parts = made(24, 70, 32, False, True)
    permuted, _ = made(24, 70, 32, False, True, permuted=True)
    assert permuted.permutation is not None and permuted.permutation.dtype is torch.int32
    for e, (*_, order) in enumerate(parts):
        assert torch.equal(permuted.permutation[e].long(), order)
        # stored column i is multiplied by input column order[i]
        assert torch.equal(permuted[e][:, order], plain[e])
        assert not torch.equal(permuted[e], plain[e])


def test_an_expert_without_a_permutation_has_the_identity() -> None:
    matrix = empty_matrix(
        1, 3, 5, Quant("int4", 32), torch.float32, "cpu", paired=False, permuted=True
    )
    put_expert(matrix, 0, torch.full((3, 5), 9, dtype=torch.uint8), torch.ones(3, 1))
    assert matrix.permutation is not None and matrix.permutation.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(matrix[0], torch.ones(3, 5))


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_works_without_storage(symmetric: bool) -> None:
    """Plans for absent devices pack on the meta device."""
    quant = Quant("int4", 64, symmetric)
    matrix = empty_matrix(3, 40, 100, quant, torch.bfloat16, "meta", paired=True)
    codes = torch.empty(40, 100, dtype=torch.uint8, device="meta")
    groups = torch.empty(40, 2, device="meta")
    put_expert(matrix, 1, codes, groups, None if symmetric else groups)
    assert matrix[1].shape == (40, 100) and matrix[1].is_meta
    assert matrix.nbytes == 3 * 3 * (2 * 512 + 2 * 16 * 2 * (1 if symmetric else 2))


def test_facts_moves_and_copies() -> None:
    matrix, _ = made(24, 70, 32, False, False, permuted=True)
    assert set(matrix.tensors()) == {"codes", "scales", "zeros", "permutation"}
    assert matrix.dtype is torch.float16 and matrix.device == torch.device("cpu")
    assert matrix.to("cpu").codes is matrix.codes
    there = matrix.to("meta")
    assert there.device.type == "meta" and there.shape == matrix.shape
    copied = matrix.clone()
    assert torch.equal(dequantize(copied), dequantize(matrix))
    assert copied.codes.data_ptr() != matrix.codes.data_ptr()


@pytest.mark.parametrize(
    ("group", "columns", "size"), [(128, 70, 128), (32, 70, 32), (-1, 70, 128), (-1, 64, 64)]
)
def test_a_whole_row_is_a_group_of_whole_blocks(group: int, columns: int, size: int) -> None:
    assert columns_per_group(group, columns) == size
