"""Launches of the streaming kernels: grids, arguments and the shape they are compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moert.backends.launch_parts import (
    activation_constants,
    direct_grid,
    grouped_grid,
    int4_args,
    sort_args,
)
from moert.backends.stream_tiles import stream_shape
from moert.config import MoEConfig
from moert.launch import Launch
from moert.plan import Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.down.registers import down_direct_registers_kernel
from moert.steps.down.streaming import down_direct_stream_kernel
from moert.steps.down.streaming_grouped import (
    down_gathered_stream_kernel,
    down_grouped_stream_kernel,
)
from moert.steps.gate_up.registers import gate_up_direct_registers_kernel
from moert.steps.gate_up.streaming import gate_up_direct_stream_kernel
from moert.steps.gate_up.streaming_grouped import (
    gate_up_gathered_stream_kernel,
    gate_up_grouped_stream_kernel,
)
from moert.weights import ExpertWeights

# by kind of tile, and what follows a sort
_GATE_UP = {
    "grouped": gate_up_grouped_stream_kernel,
    "stream": gate_up_direct_stream_kernel,
    "gathered": gate_up_gathered_stream_kernel,
    "registers": gate_up_direct_registers_kernel,
}
_DOWN = {
    "grouped": down_grouped_stream_kernel,
    "stream": down_direct_stream_kernel,
    "gathered": down_gathered_stream_kernel,
    "registers": down_direct_registers_kernel,
}


def gate_up_stream(
    cfg: MoEConfig,
    weights: ExpertWeights,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    unsorted: bool,
) -> Launch:
    """The gate/up GEMM; views: "h", and those of the sort where there is one."""
    constants = {"K": cfg.top_k, **activation_constants(cfg)}
    args = {"b13_ptr": weights.b13, "h_ptr": views["h"]}
    return _launch(cfg, weights, tile, views, unsorted, True, args, constants)


def down_stream(
    cfg: MoEConfig,
    weights: ExpertWeights,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    unsorted: bool,
) -> Launch:
    """The down GEMM; views as for `gate_up_stream`, and "y" but where each program sums a token's experts."""
    args: dict[str, Any] = {"b2_ptr": weights.b2, "h_ptr": views["h"]}
    if not unsorted:
        args |= {"sorted_weights": views["sorted_weights"]}
    if not unsorted or tile.kernel == "gathered":
        args |= {"y_ptr": views["y"]}
    return _launch(cfg, weights, tile, views, unsorted, False, args, {"K": cfg.top_k})


def _launch(
    cfg: MoEConfig,
    weights: ExpertWeights,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    unsorted: bool,
    up: bool,
    args: dict[str, Any],
    constants: dict[str, Any],
) -> Launch:
    matrix = weights.w13 if up else weights.w2
    name = "w13_ptr" if up else "w2_ptr"
    strides = (0, 0)
    if isinstance(matrix, Int4Matrix):
        args |= int4_args(name, matrix)
    else:
        args |= {name: matrix, "scales_ptr": None, "zeros_ptr": None}
        strides = (matrix.stride(0), matrix.stride(1))
    gathered = tile.kernel == "gathered"
    direct = unsorted and not gathered
    shape = stream_shape(
        cfg, tile, up=up, direct=direct, interleaved=weights.interleaved, strides=strides
    )
    constants = {**constants, "S": shape}
    kernel = (_GATE_UP if up else _DOWN)[tile.kernel if unsorted else "grouped"]
    if unsorted:
        constants["E"] = cfg.num_experts
        grid = direct_grid(shape.tiles, cfg.top_k if up or gathered else 1)
    else:
        args |= sort_args(views)
        grid = grouped_grid(cfg, tile.bm, shape.tiles)
    return Launch(kernel, grid, args, constants, tile.num_warps, 1)
