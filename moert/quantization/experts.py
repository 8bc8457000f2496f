"""What `ExpertWeights` does with int4 matrices: describe, make at random, refuse or take new values."""

from __future__ import annotations

from typing import Any

import torch

from moert.config import Quant
from moert.errors import WeightsError
from moert.quantization.int4_layout import Int4Matrix, columns_per_group
from moert.quantization.int4_rounding import quantize_experts, quantize_matrix


def quant_of(w13: object, w2: object) -> Quant | None:
    """The description of two matrices; None for floating ones.

    A group size that equals whole rows of both matrices is told as -1.
    """
    if not (isinstance(w13, Int4Matrix) and isinstance(w2, Int4Matrix)):
        return None
    whole = all(m.group_size == columns_per_group(-1, m.columns) for m in (w13, w2))
    return Quant("int4", -1 if whole else w13.group_size, w13.zeros is None)


def quantize_layer(
    w13: Any, w2: Any, b13: torch.Tensor | None, interleaved: bool, quant: Quant
) -> dict[str, Any]:
    """Int4 w13 and w2, and b13 in the order of their rows.

    Raises:
        WeightsError: matrices that are int4 already, or not finite, or of shapes that do not fit.
    """
    for name, weight in (("w13", w13), ("w2", w2)):
        if isinstance(weight, Int4Matrix):
            raise WeightsError(f"{name}: int4 already; quantise from floating weights")
    rows, inner = w13.shape[1], w2.shape[2]
    if rows not in (inner, 2 * inner):
        raise WeightsError(f"w13: {rows} rows, need I={inner} of w2, or 2I for gate and up")
    gated = rows == 2 * inner
    if b13 is not None and interleaved:
        b13 = torch.cat((b13[:, 0::2], b13[:, 1::2]), dim=1)
    return {
        "w13": quantize_matrix(w13, quant, "w13", paired=gated, interleaved=interleaved),
        "w2": quantize_matrix(w2, quant, "w2", paired=False),
        "b13": b13,
        "interleaved": False,
    }


def random_matrix(
    shape: tuple[int, int, int],
    std: float,
    quant: Quant,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    paired: bool,
) -> Int4Matrix:
    """Normal values, rounded, drawn expert by expert on the generator's device."""
    device = generator.device
    rows = torch.empty(shape[1:], dtype=dtype, device=device)

    def draw(_: int) -> torch.Tensor:
        return rows.normal_(0.0, std, generator=generator)

    return quantize_experts(draw, shape, quant, dtype, device, "random", paired=paired)


def check_replacement(name: str, mine: Int4Matrix, value: object) -> None:
    """Refuse anything but a matrix of the same layout as new values of an int4 one.

    Raises:
        WeightsError: the difference.
    """
    if not isinstance(value, Int4Matrix):
        raise WeightsError(
            f"{name}: got {type(value).__name__}, need an Int4Matrix of the layout there: an update does not "
            "round; make one with ExpertWeights.quantize or .from_skinny_int4"
        )
    facts = ("rows", "columns", "group_size", "paired")
    differing = [f for f in facts if getattr(mine, f) != getattr(value, f)]
    there, given = mine.tensors(), value.tensors()
    differing += sorted(there.keys() ^ given.keys())
    differing += [f for f in there.keys() & given.keys() if there[f].shape != given[f].shape]
    if differing:
        raise WeightsError(
            f"{name}: an int4 matrix with other {', '.join(sorted(differing))}; need the same layout"
        )
