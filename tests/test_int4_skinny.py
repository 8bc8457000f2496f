"""The exchange layout of int4 matrices: nibble by nibble, exact both ways, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moert.errors import WeightsError
from moert.quantization.int4_layout import dequantize
from moert.quantization.int4_skinny import SkinnyInt4, pack, unpack
from moert.quantization.nibbles import nibbles_to_words, words_to_nibbles

E = 2
# (N, K, group size, paired): odd N; K of the models that are no multiple of a block
SHAPES = [
    (7, 64, 32, False),
    (48, 200, 64, True),
    (33, 2880, 32, False),
    (16, 24, 128, True),
    (9, 72, -1, False),
    (3, 13, 32, False),  # a last word that is not full
]


def given(n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype) -> SkinnyInt4:
    g = torch.Generator().manual_seed(n + k)
    groups = 1 if group == -1 else -(-k // group)
    low, high = -(2**31), 2**31
    codes = torch.randint(low, high, (E, n, -(-k // 8)), generator=g).to(torch.int32)
    scales = torch.randn(E, n, groups, generator=g).to(dtype)
    zeros = torch.randint(0, 16, scales.shape, generator=g).to(dtype)
    return SkinnyInt4(codes, scales, None if symmetric else zeros, k, group)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k", "group", "paired"), SHAPES)
def test_exact_there_and_back(
    n: int, k: int, group: int, paired: bool, dtype: torch.dtype, symmetric: bool
) -> None:
    before = given(n, k, group, symmetric, dtype)
    matrix = pack(before, paired=paired)
    assert matrix.shape == (E, n, k) and matrix.dtype is dtype and matrix.paired == paired
    after = unpack(matrix)
    used = -(-k // 8) * 8 == k
    if used:
        assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scales, before.scales) and after.scales.dtype is dtype
    if symmetric:
        assert after.zeros is None
    else:
        assert torch.equal(after.zeros, before.zeros)
    again = pack(after, paired=paired)
    for name, tensor in matrix.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert (again.group_size, again.columns) == (matrix.group_size, k)


def test_the_order_of_the_nibbles() -> None:
    """k -> bit 4 (k >> 1) + 16 (k & 1), as ROCm's kernels have it."""
    codes = torch.arange(16) % 13
    words = [
        sum(int(codes[8 * j + k]) << (4 * (k >> 1) + 16 * (k & 1)) for k in range(8))
        for j in (0, 1)
    ]
    signed = torch.tensor(words).to(torch.int32)  # as the 32 bits they are
    matrix = pack(SkinnyInt4(signed.view(1, 1, 2), torch.ones(1, 1, 1), None, 16, 32), paired=False)
    assert torch.equal(dequantize(matrix)[0, 0], codes.float() - 8)


def test_words_and_nibbles() -> None:
    nibbles = torch.arange(16, dtype=torch.uint8).view(2, 8)
    words = nibbles_to_words(nibbles)
    assert [f"{int(w) & 0xFFFFFFFF:08x}" for w in words] == ["76543210", "fedcba98"]
    assert torch.equal(words_to_nibbles(words), nibbles)
    assert torch.equal(words_to_nibbles(words[::2].expand(3, 1)), nibbles[:1].expand(3, 1, 8))


def test_a_permutation_travels_along() -> None:
    order = torch.stack([torch.randperm(64) for _ in range(E)]).int()
    before = replace(given(7, 64, 32, True, torch.float16), permutation=order)
    after = unpack(pack(before, paired=False))
    assert after.permutation is not None and torch.equal(after.permutation, order)
    assert torch.equal(after.codes, before.codes)


def test_it_works_without_storage() -> None:
    before = given(8, 64, 32, False, torch.float16)
    on_meta = {n: getattr(before, n).to("meta") for n in ("codes", "scales", "zeros")}
    after = unpack(pack(replace(before, **on_meta), paired=True))
    assert after.codes.is_meta and after.codes.shape == before.codes.shape


def misfit(**differing: Any) -> dict[str, Any]:
    return differing


GOOD = given(8, 64, 32, False, torch.float16)
ZEROS = GOOD.zeros
assert ZEROS is not None


@pytest.mark.parametrize(
    ("differing", "words"),
    [
        (misfit(group_size=48), ["w13", "group_size=48", "32"]),
        (misfit(group_size=0), ["group_size=0"]),
        (misfit(group_size=64), ["w13.scales", "[2, 8, 2]", "[2, 8, 1]", "64"]),
        (misfit(columns=65), ["w13.columns=65", "57..64"]),
        (misfit(columns=56), ["w13.columns=56", "57..64"]),
        (misfit(columns=0), ["w13.columns=0"]),
        (misfit(codes=GOOD.codes.long()), ["w13.codes", "int64", "int32"]),
        (misfit(codes=GOOD.codes[0]), ["w13.codes", "[8, 8]", "[E, N, ceil(K / 8)]"]),
        (misfit(codes=GOOD.codes[:, :7], scales=GOOD.scales[:, :7]), ["7 rows", "gate"]),
        (misfit(scales=GOOD.scales.double()), ["w13.scales", "float64"]),
        (misfit(scales=GOOD.scales.float()), ["w13.zeros", "float16"]),
        (misfit(zeros=ZEROS[:, :4]), ["w13.zeros", "[2, 4, 2]", "[2, 8, 2]"]),
        (misfit(zeros=ZEROS + 1.5), ["w13.zeros", "0..15"]),
        (misfit(zeros=ZEROS - 16), ["w13.zeros", "is -", "0..15"]),
        (misfit(zeros=torch.full_like(ZEROS, 16)), ["w13.zeros", "is 16"]),
        (misfit(zeros=torch.full_like(ZEROS, float("nan"))), ["w13.zeros", "nan"]),
        (misfit(permutation=torch.zeros(E, 63, dtype=torch.int32)), ["permutation", "[2, 63]"]),
        (misfit(permutation=torch.zeros(E, 64)), ["permutation", "float32"]),
    ],
)
def test_what_does_not_fit_is_refused(differing: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(WeightsError) as error:
        pack(replace(GOOD, **differing), "w13", paired=True)
    for word in words:
        assert word in str(error.value)
