"""What kernels of fixed-point inputs need beside the others: fields, and rows split before each GEMM."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert.arena import Field
from moert.backends.launch_parts import direct_grid
from moert.backends.stream_tiles import gemm_sizes
from moert.config import MoEConfig
from moert.launch import Launch
from moert.plan import Tile
from moert.steps.fixed_point.layout import STEP, padded_columns
from moert.steps.fixed_point.triton import split_h_kernel, split_x_kernel

Views = Mapping[str, torch.Tensor]
PART = 1024  # columns a program splits, 8 a lane of 4 warps


def fixed_fields(cfg: MoEConfig, tokens: int) -> tuple[Field, ...]:
    """Rows of x and of h as they are multiplied, what their units are worth, and sums for zero points.

    Both are in one place: x is no longer needed once h is there.
    """
    assert cfg.quant is not None
    sizes = ((tokens, cfg.hidden_size), (tokens * cfg.top_k, cfg.intermediate_size))
    padded = [(rows, padded_columns(columns)) for rows, columns in sizes]
    most = max(rows * columns for rows, columns in padded)
    fields = (
        Field("planes", (2 * most,), torch.int8),
        Field("worth", (most // STEP,), torch.float32),
    )
    if cfg.quant.symmetric:
        return fields
    return (*fields, Field("sums", (most // STEP,), torch.float32))


def fixed_inputs(views: Views) -> dict[str, torch.Tensor | None]:
    """The fields by the names of kernel arguments; None where there is none."""
    return {f"{name}_ptr": views.get(name) for name in ("planes", "worth", "sums")}


def split_inputs(cfg: MoEConfig, tile: Tile, views: Views, *, up: bool) -> list[Launch]:
    """What precedes the GEMM of a tile: nothing where its inputs are 16-bit floats.

    Args:
        views: "h", and those of `fixed_fields`.
        up: the rows of x for the gate/up GEMM, else those of h for the down GEMM.
    """
    if tile.kernel != "fixed":
        return []
    columns, _ = gemm_sizes(cfg, up)
    padded = padded_columns(columns)
    constants = {"COLUMNS": columns, "PADDED": padded, "PART": PART}
    parts, args = -(-padded // PART), fixed_inputs(views)
    if up:
        return [Launch(split_x_kernel, direct_grid(parts, 1), args, constants, 4, 1)]
    args |= {"h_ptr": views["h"]}
    constants |= {"K": cfg.top_k}
    return [Launch(split_h_kernel, direct_grid(parts, cfg.top_k), args, constants, 4, 1)]
