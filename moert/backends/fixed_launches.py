"""Launches of the kernels of fixed-point inputs: rows are split before each of the two GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from moert.arena import Field
from moert.backends.fixed_tiles import fixed_shape
from moert.backends.launch_parts import activation_constants, direct_grid, int4_args, sort_args
from moert.backends.stream_tiles import gemm_sizes
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.launch import Grid, Launch
from moert.plan import Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.down.specialised_fixed import down_specialised_fixed_kernel
from moert.steps.fixed_point.layout import STEP, padded_columns
from moert.steps.fixed_point.triton import split_h_kernel, split_x_kernel
from moert.steps.gate_up.specialised_fixed import gate_up_specialised_fixed_kernel
from moert.weights import ExpertWeights

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


def gate_up_fixed(
    cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts, tile: Tile, views: Views
) -> list[Launch]:
    """The gate/up GEMM; views: "h", those of the sort and of `fixed_fields`."""
    args = {"b13_ptr": weights.b13, "h_ptr": views["h"]}
    constants = {"K": cfg.top_k, **activation_constants(cfg)}
    split = Launch(split_x_kernel, _grid(cfg, True), _planes(views), _columns(cfg, True), 4, 1)
    gemm = Launch(
        gate_up_specialised_fixed_kernel,
        lambda tokens: (facts.compute_units, 1, 1),
        {**args, **_planes(views), **sort_args(views), **int4_args("w13_ptr", _int4(weights.w13))},
        {**constants, "S": fixed_shape(cfg, facts, tile, up=True)},
        tile.num_warps,
        1,
    )
    return [split, gemm]


def down_fixed(
    cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts, tile: Tile, views: Views
) -> list[Launch]:
    """The down GEMM; views as for `gate_up_fixed`, and "y"."""
    args = {
        "b2_ptr": weights.b2,
        "y_ptr": views["y"],
        "sorted_weights": views["sorted_weights"],
    }
    split = Launch(
        split_h_kernel,
        _grid(cfg, False),
        {"h_ptr": views["h"], **_planes(views)},
        {"K": cfg.top_k, **_columns(cfg, False)},
        4,
        1,
    )
    gemm = Launch(
        down_specialised_fixed_kernel,
        lambda tokens: (facts.compute_units, 1, 1),
        {**args, **_planes(views), **sort_args(views), **int4_args("w2_ptr", _int4(weights.w2))},
        {"K": cfg.top_k, "S": fixed_shape(cfg, facts, tile, up=False)},
        tile.num_warps,
        1,
    )
    return [split, gemm]


def _int4(matrix: torch.Tensor | Int4Matrix) -> Int4Matrix:
    assert isinstance(matrix, Int4Matrix)
    return matrix


def _planes(views: Views) -> dict[str, torch.Tensor | None]:
    return {f"{name}_ptr": views.get(name) for name in ("planes", "worth", "sums")}


def _columns(cfg: MoEConfig, up: bool) -> dict[str, int]:
    columns, _ = gemm_sizes(cfg, up)
    return {"COLUMNS": columns, "PADDED": padded_columns(columns), "PART": PART}


def _grid(cfg: MoEConfig, up: bool) -> Callable[[int], Grid]:
    columns, _ = gemm_sizes(cfg, up)
    return direct_grid(-(-padded_columns(columns) // PART), 1 if up else cfg.top_k)
