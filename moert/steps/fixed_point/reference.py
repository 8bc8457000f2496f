"""What the kernels of this step write, in torch."""

from __future__ import annotations

import torch

from moert.steps.fixed_point.layout import BITS, STEP, padded_columns


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as fixed-point numbers.

    Args:
        x: [R, C] of a 16-bit float dtype.

    Returns:
        [R, 2, C padded] int8, what a unit of the numbers is worth, [R, C padded / 128] float32, and what the
        numbers of each group add up to, as large.
    """
    columns = padded_columns(x.shape[1])
    wide = torch.zeros(x.shape[0], columns, dtype=torch.float32, device=x.device)
    wide[:, : x.shape[1]] = x.float()
    groups = wide.view(x.shape[0], -1, STEP)
    largest = groups.abs().amax(2)
    finite = torch.isfinite(largest)
    _, exponent = torch.frexp(torch.where(finite & (largest > 0), largest, 1.0))
    worth = torch.ldexp(torch.ones_like(largest), exponent - 1 - BITS)
    numbers = torch.where(finite[:, :, None], groups / worth[:, :, None], 0.0).round()
    sums = numbers.sum(2) * worth
    numbers = numbers.to(torch.int32).view(x.shape[0], columns)
    # place 4 c + 2 v0 + v2 of 16 holds column 8 v2 + 2 c + v0
    numbers = numbers.view(x.shape[0], -1, 2, 4, 2).permute(0, 1, 3, 4, 2).reshape(-1, columns)
    planes = torch.stack((numbers >> 7, numbers & 127), 1).to(torch.int8)
    return planes, torch.where(finite, worth, float("nan")), sums


def join(planes: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """The float32 rows [R, C padded] that numbers of `split` stand for."""
    rows, _, columns = planes.shape
    numbers = planes[:, 0].to(torch.int32) * 128 + planes[:, 1].to(torch.int32)
    numbers = numbers.view(rows, -1, 4, 2, 2).permute(0, 1, 4, 2, 3).reshape(rows, columns)
    return (numbers.view(rows, -1, STEP).float() * worth[:, :, None]).view(rows, columns)
