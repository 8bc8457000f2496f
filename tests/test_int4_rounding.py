"""Rounding to int4: the nearest code, the bound on the error, the odd groups."""

from __future__ import annotations

import pytest
import torch
from expert_cases import relative_error

from moert.config import Quant
from moert.errors import WeightsError
from moert.quantization.int4_layout import columns_per_group, dequantize, dequantize_rows
from moert.quantization.int4_rounding import quantize_matrix, quantize_rows

# K, group size: groups that end inside, one a row, one longer than the row
GROUPS = [(256, 32), (256, 128), (200, 64), (200, -1), (24, 128)]
# of rounding the scale itself, relative
SCALE_ERROR = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def weight(k: int, dtype: torch.dtype, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(k)
    return (torch.randn(48, k, generator=g) + shift).to(dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "group"), GROUPS)
def test_no_weight_is_further_off_than_half_a_step(
    k: int, group: int, dtype: torch.dtype, symmetric: bool
) -> None:
    w = weight(k, dtype)
    codes, scales, zeros = quantize_rows(w, Quant("int4", group, symmetric))
    size = columns_per_group(group, k)
    assert codes.dtype is torch.uint8 and int(codes.max()) <= 15 and codes.shape == w.shape
    assert scales.dtype is dtype and scales.shape == (48, -(-k // size))
    assert (zeros is None) == symmetric
    if zeros is not None:
        assert (
            torch.equal(zeros, zeros.round())
            and float(zeros.min()) >= 0
            and float(zeros.max()) <= 15
        )
    got = dequantize_rows(codes, scales, zeros, size)
    step = scales.float().repeat_interleave(size, 1)[:, :k]
    # a zero point is rounded, too, and the outermost codes lie 8 (or 15) rounded scales away
    allowed = (0.5 if symmetric else 1.0) + 15 * SCALE_ERROR[dtype]
    assert bool(((got - w.float()).abs() <= step * allowed).all())
    # as small a step as the bound allows: within a group the largest weight needs all codes
    padded = torch.nn.functional.pad(w.float(), (0, -k % size)).view(48, -1, size)
    span = padded.abs().amax(-1) / 7.5 if symmetric else (padded.amax(-1) - padded.amin(-1)) / 15
    assert torch.allclose(scales.float(), span, rtol=2 * SCALE_ERROR[dtype])


def test_the_codes_are_the_nearest() -> None:
    w = weight(64, torch.float32)
    codes, scales, _ = quantize_rows(w, Quant("int4", 32))
    grid = (torch.arange(16) - 8).float()
    step = scales.repeat_interleave(32, 1)
    nearest = (w.unsqueeze(-1) - grid * step.unsqueeze(-1)).abs().min(-1).values
    got = (dequantize_rows(codes, scales, None, 32) - w).abs()
    assert torch.allclose(got, nearest, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric: bool) -> None:
    w = weight(96, torch.float16)
    w[3, 32:64] = 0
    w[4] = 0
    w[5, :32] = 6e-8  # so small that a step would be zero in float16
    parts = quantize_rows(w, Quant("int4", 32, symmetric))
    got = dequantize_rows(*parts, 32)
    assert (got[3, 32:64] == 0).all() and (got[4] == 0).all() and (got[5, :32].abs() <= 6e-8).all()
    assert got.isfinite().all() and got[3, :32].any()


def test_one_sided_weights_use_every_code() -> None:
    w = weight(64, torch.float32).abs() + 1
    codes, _, zeros = quantize_rows(w, Quant("int4", 32, symmetric=False))
    assert zeros is not None and (zeros == 0).all() and int(codes.max()) == 15
    codes, _, zeros = quantize_rows(-w, Quant("int4", 32, symmetric=False))
    assert zeros is not None and (zeros == 15).all() and int(codes.min()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_are_refused(bad: float, symmetric: bool) -> None:
    w = torch.randn(3, 16, 64)
    w[2, 5, 63] = bad
    with pytest.raises(WeightsError, match=r"w2\[2\].*NaN or infinity"):
        quantize_matrix(w, Quant("int4", 32, symmetric), "w2", paired=False)


@pytest.mark.parametrize("k", [64, 200])
def test_matrices_of_any_strides(k: int) -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(3, 40, k, generator=g)
    quant = Quant("int4", 64, symmetric=False)
    plain = quantize_matrix(w, quant, "w13", paired=True)
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(quantize_matrix(turned, quant, "w13", paired=True).codes, plain.codes)
    mixed = torch.stack((w[:, :20], w[:, 20:]), dim=2).flatten(1, 2)
    packed = quantize_matrix(mixed, quant, "w13", paired=True, interleaved=True)
    for name, tensor in plain.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor), name
    # what 16 levels over a group's range cost normal values
    assert relative_error(dequantize(plain), w) < 0.12
